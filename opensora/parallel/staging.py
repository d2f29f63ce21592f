"""The way of a batch from the host to the device, beside the computation on the one before.

    workers' shared memory -> page-locked buffer -> device        (a thread)       (a side stream)

A thread takes batches from the loader, copies them into page-locked buffers and hands the copies to the device to a
side stream. At most AHEAD batches wait on the device; the next one waits in page-locked memory. On a device without
streams the thread only reads ahead: nothing is copied.
"""

from __future__ import annotations

import bisect
import mmap
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora.common import get_logger
from opensora.data.batch import Batch
from opensora.parallel.streams import NoStream, SideStream, side_stream

AHEAD = 1  # batches that wait on the device
IN_FLIGHT = AHEAD + 1  # batches in page-locked buffers: one on its way to the device, one being copied to the buffer
# Seconds that a run that ends waits for the batch that is being read; a run that fails, or is broken off, hardly waits.
LONGEST_WAIT, SHORT_WAIT = 60.0, 1.0


class StagedBatches:
    """The batches of an iterator, in its order, with their tensors on `device`.

    A batch's tensors may be used until the next batch is asked for: work given to the current stream by then is waited
    for before their memory is used again. Iterate in one thread, and `close` at the end (or use as a context manager).

    Args:
        batches: read in a thread of its own; what it raises is raised by `next`.
        pre_alloc_numels: sizes of buffers that are allocated at the start, in elements of `element_size` bytes. Others
            are allocated when a batch first needs them. Beyond the IN_FLIGHT largest they would never be used.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        pre_alloc_numels: Sequence[int] | None = None,
        element_size: int = 1,
    ):
        self._batches = batches
        self._stream = side_stream(device)
        sizes = sorted((numel * element_size for numel in pre_alloc_numels or ()), reverse=True)
        self._buffers = StagingBuffers(self._stream, sizes[:IN_FLIGHT] if self._stream.page_locks else ())
        self._room = threading.Semaphore(AHEAD)
        self._ready: queue.SimpleQueue[tuple[Batch | None, Any]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def __iter__(self) -> StagedBatches:
        return self

    def __next__(self) -> Batch:
        if self._stopping:
            raise StopIteration
        self._stream.follow()
        batch, outcome = self._ready.get()
        if batch is None:
            self.close()
            raise StopIteration if outcome is None else outcome
        self._stream.wait(outcome)
        self._room.release()
        return batch

    def __enter__(self) -> StagedBatches:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(LONGEST_WAIT if error is None else SHORT_WAIT)

    def close(self, patience_s: float = LONGEST_WAIT) -> None:
        """Stop reading ahead. A batch that takes longer to be read is left to a thread that ends with the process."""
        self._stopping = True
        self._room.release()
        self._thread.join(patience_s)

    def _run(self) -> None:
        try:
            with self._stream.on_device():
                self._stage()
            self._ready.put((None, None))
        except BaseException as error:  # whatever it is, it belongs to the thread that trains
            self._ready.put((None, error))

    def _stage(self) -> None:
        for batch in self._batches:
            if self._stopping:
                return
            host = batch.map_tensors(self._buffers.fill) if self._stream.page_locks else batch
            self._room.acquire()
            if self._stopping:
                return
            copied = None

            def upload(tensor: Tensor) -> Tensor:
                nonlocal copied
                tensor, copied = self._stream.upload(tensor)
                return tensor

            staged = host.map_tensors(upload)
            self._buffers.sent(copied)
            self._ready.put((staged, copied))


class StagingBuffers:
    """Page-locked buffers that batches of any shape take turns in; used by one thread.

    A tensor takes the smallest free buffer that holds it. Where none does, a new one takes the place of the largest
    free one: there are never more buffers than tensors in flight, nor any larger than the largest tensor or than asked
    for at the start.
    """

    def __init__(self, stream: SideStream | NoStream, sizes: Sequence[int] = ()):
        self._stream = stream
        self._free: list[_Buffer] = []  # the smallest first
        self._filled: list[_Buffer] = []  # of the batch that is being copied to them
        self._on_their_way: deque[tuple[list[_Buffer], Any]] = deque()
        self._said_pageable = False
        for size in sizes:
            self._put_back(self._allocate(size))

    @property
    def sizes(self) -> list[int]:
        """Bytes of all buffers."""
        on_their_way = [buffer for buffers, _ in self._on_their_way for buffer in buffers]
        return sorted(buffer.memory.nbytes for buffer in (*self._free, *self._filled, *on_their_way))

    def fill(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in a buffer, until that many further batches were `sent`."""
        if not self._filled and len(self._on_their_way) == IN_FLIGHT:
            buffers, copied = self._on_their_way.popleft()
            self._stream.wait_on_host(copied)
            for buffer in buffers:
                self._put_back(buffer)
        buffer = self._take(tensor.nbytes)
        self._filled.append(buffer)
        place = buffer.memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)

    def sent(self, copied: Any) -> None:
        """The tensors filled in since the last call are on their way to the device until `copied`."""
        if self._filled:
            self._on_their_way.append((self._filled, copied))
            self._filled = []

    def _take(self, size: int) -> _Buffer:
        place = bisect.bisect_left(self._free, size, key=_size)
        if place < len(self._free):
            return self._free.pop(place)
        if self._free:
            self._free.pop()  # given back before the larger one is taken
        return self._allocate(size)

    def _put_back(self, buffer: _Buffer) -> None:
        bisect.insort(self._free, buffer, key=_size)

    def _allocate(self, size: int) -> _Buffer:
        buffer = _Buffer(size)
        try:
            self._stream.page_lock(buffer.pages, owner=buffer)
        except RuntimeError as error:
            if not self._said_pageable:
                self._said_pageable = True
                get_logger().warning(
                    "this host gives no %.1f MiB of page-locked memory (%s): batches are copied to the device more "
                    "slowly", *(size / 2**20, error),
                )  # fmt: skip
        return buffer


class _Buffer:
    """`size` bytes whose page-lock ends with this object: in pages of their own, since it is pages that are locked."""

    def __init__(self, size: int):
        length = -(-max(1, size) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages = torch.frombuffer(pages, dtype=torch.uint8)
        self.memory = self.pages[:size]


def _size(buffer: _Buffer) -> int:
    return buffer.memory.nbytes
