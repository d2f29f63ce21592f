"""Keys of cached entries, sorted in a mapped file: however many there are, a process has next to none in its memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensora.data.remote import URL

REJECTED = 2**63 - 1  # in place of where an entry is: its file could not be read
_SORTED_AT_ONCE = 1 << 22  # rows, which is what is in memory while an index is made
_READ_AT_ONCE = 1 << 20


class Key(NamedTuple):
    """128 bits, as two signed integers."""

    high: int
    low: int


def file_mark(path: str) -> int:
    """A number that changes when a file is replaced or written to: of its size and time. 0 if there is no local one."""
    if URL.match(path):
        return 0
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the name
        return 0
    digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def has_changed(path: str, mark: int) -> bool:
    """Whether a file is another one than that of `mark`. One that is gone, or was never marked, is not."""
    return mark != 0 and file_mark(path) not in (0, mark)


class KeyIndex:
    """Rows of an index by their key.

    Args:
        columns: int64 [4, N]: the halves of the keys, sorted; where each entry is; the `file_mark` of its file.
    """

    def __init__(self, columns: NDArray[np.int64]):
        self.highs, self.lows, self.places, self.marks = columns

    @classmethod
    def load(cls, file: Path) -> KeyIndex:
        return cls(np.load(file, mmap_mode="r"))

    def find(self, key: Key) -> int | None:
        return _find(self.highs, self.lows, key)

    def mark(self, key: Key) -> int | None:
        """None if there is no such key."""
        at = self.find(key)
        return None if at is None else int(self.marks[at])

    def __contains__(self, key: Key) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return len(self.highs)


def _find(highs: NDArray[np.int64], lows: NDArray[np.int64], key: Key) -> int | None:
    at = int(np.searchsorted(highs, key.high))
    while at < len(highs) and highs[at] == key.high:
        if lows[at] == key.low:
            return at
        at += 1
    return None


class KeySet:
    """Keys that are added many at a time: 16 bytes each, in sorted runs of which each is longer than the next."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.int64]] = []  # [2, n]

    def add(self, keys: Sequence[Key]) -> None:
        run = np.array(keys, dtype=np.int64).reshape(-1, 2).T
        while self._runs and self._runs[-1].shape[1] <= run.shape[1]:
            run = np.concatenate([self._runs.pop(), run], axis=1)
        self._runs.append(run[:, np.argsort(run[0])])

    def __contains__(self, key: Key) -> bool:
        return any(_find(highs, lows, key) is not None for highs, lows in self._runs)


def write_index(file: Path, pieces: Iterable[NDArray[np.int64]]) -> None:
    """Sort rows into an index, for `KeyIndex.load`. Of rows of one key that with the highest place stays.

    Args:
        pieces: int64 [n, 4], the columns of `KeyIndex`.
    """
    unsorted, rows = file.with_name(f".{file.name}.unsorted"), file.with_name(f".{file.name}.rows")
    try:
        with open(unsorted, "wb") as out:
            for piece in pieces:
                out.write(np.ascontiguousarray(piece, dtype=np.int64))
        with open(rows, "wb") as out:
            for part in _sorted_parts(_map_rows(unsorted)):
                out.write(part)
        _transpose(_map_rows(rows), file)
    finally:
        unsorted.unlink(missing_ok=True)
        rows.unlink(missing_ok=True)


def _map_rows(file: Path) -> NDArray[np.int64]:
    """[n, 4]"""
    if not file.stat().st_size:
        return np.empty((0, 4), dtype=np.int64)
    return np.memmap(file, np.int64, mode="r").reshape(-1, 4)


def _sorted_parts(rows: NDArray[np.int64]) -> Iterable[NDArray[np.int64]]:
    """The rows in order, in parts of like size: first halves are hashes, and so all alike in number."""
    count = -(-len(rows) // _SORTED_AT_ONCE)
    bounds = [-(2**63) + 2**64 * i // count for i in range(count)] if count else []
    for first, end in zip(bounds, [*bounds[1:], 2**63], strict=True) if count else ():
        found = []
        for start in range(0, len(rows), _READ_AT_ONCE):
            piece = rows[start : start + _READ_AT_ONCE]
            found.append(piece[(piece[:, 0] >= first) & (piece[:, 0] <= end - 1)])
        part = np.concatenate(found)
        part = part[np.lexsort((-part[:, 2], part[:, 1], part[:, 0]))]
        is_first = np.ones(len(part), dtype=bool)
        is_first[1:] = (part[1:, :2] != part[:-1, :2]).any(axis=1)
        yield part[is_first]


def _transpose(rows: NDArray[np.int64], file: Path) -> None:
    """Rows [N, 4] to a file of columns [4, N], which can be searched without being copied."""
    if not len(rows):
        with open(file, "wb") as out:
            np.save(out, rows.T)
        return
    columns = np.lib.format.open_memmap(file, "w+", np.int64, (4, len(rows)))
    for start in range(0, len(rows), _READ_AT_ONCE):
        columns[:, start : start + _READ_AT_ONCE] = rows[start : start + _READ_AT_ONCE].T
    columns.flush()
