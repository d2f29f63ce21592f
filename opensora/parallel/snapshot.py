"""A copy in host memory of what a rank is about to write, taken while nothing changes it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.common import get_logger
from opensora.parallel.streams import side_stream

PAGE_BYTES = 4096  # files begin at multiples: what is written without the page cache has to


# Not for the children of a fork; in huge pages, where a first touch costs a fault for 2 MiB, not for 4 KiB.
_ADVICE = [getattr(mmap, name) for name in ("MADV_DONTFORK", "MADV_HUGEPAGE") if hasattr(mmap, name)]


class Piece(NamedTuple):
    """A part of a file: what is at byte `offset` of it."""

    file: str
    offset: int
    data: bytes | memoryview | Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, Tensor) else len(self.data)


class SnapshotMemory:
    """Host memory for one snapshot at a time, page-locked where the device copies to it by itself.

    Kept between snapshots, it is allocated once. Children of a fork do not have it: as long as one lived, each page
    that is written again would be copied first.
    """

    def __init__(self, device: torch.device):
        self._stream = side_stream(device)
        self._pages: _Pages | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._pages is None else self._pages.tensor.nbytes

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Get the memory that `take` of files of these sizes needs; MemoryError: the host does not give so much."""
        self._reserve(max(sum(map(_whole_pages, sizes.values())), PAGE_BYTES))

    def take(self, sizes: Mapping[str, int], pieces: Iterable[Piece]) -> dict[str, memoryview]:
        """The bytes of files by name, put together from pieces; valid until the next call or `release`.

        What the current stream has been given to do is done first; the pieces' tensors may change afterwards.

        Args:
            sizes: of the files, in bytes. What no piece covers of them is zero.
            pieces: those of a file in the order of their offsets.

        Raises:
            MemoryError: the host does not give so much.
        """
        self.reserve(sizes)
        places, end = {}, 0
        for name, size in sizes.items():
            places[name], end = end, end + _whole_pages(size)
        filled = dict(places)
        for piece in pieces:
            start = places[piece.file] + piece.offset
            self._clear(filled[piece.file], start)
            self._put(start, piece.data)
            filled[piece.file] = start + piece.nbytes
        for name, size in sizes.items():
            self._clear(filled[name], places[name] + size)
        self._stream.wait_for_current()
        whole = memoryview(self._pages.map)
        return {name: whole[places[name] : places[name] + size] for name, size in sizes.items()}

    def _clear(self, start: int, stop: int) -> None:
        if start < stop:
            self._pages.tensor[start:stop].zero_()

    def _put(self, start: int, data: bytes | memoryview | Tensor) -> None:
        if isinstance(data, Tensor):
            place = self._pages.tensor[start : start + data.nbytes].view(data.dtype).view(data.shape)
            place.copy_(data, non_blocking=True)
        else:
            self._pages.map[start : start + len(data)] = data

    def release(self) -> None:
        self._pages = None

    def _reserve(self, nbytes: int) -> None:
        if nbytes <= self.nbytes:
            return
        self._pages = None  # given back before more is taken
        try:
            self._pages = _Pages(nbytes)
        except OSError as error:
            raise MemoryError(f"the host has no {nbytes / 2**30:.1f} GiB for a copy of what is saved") from error
        try:
            self._stream.page_lock(self._pages.tensor, owner=self._pages)
        except RuntimeError as error:
            get_logger().warning(
                "this host gives no %.1f GiB of page-locked memory (%s): checkpoints are copied to it more slowly",
                nbytes / 2**30, error,
            )  # fmt: skip


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class _Pages:
    """Memory that begins at a page; its page-lock ends with this object."""

    def __init__(self, nbytes: int):
        self.map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in _ADVICE:
            with suppress(OSError):  # a kernel without huge pages
                self.map.madvise(advice)
        self.tensor = torch.frombuffer(self.map, dtype=torch.uint8)
