"""The rows of a table in files that need no parsing: numbers to be mapped, strings to be read by row.

A folder holds for N rows, little-endian and without headers:

    <column>.<type>   [N], one file per column of numbers, e.g. num_frames.int32
    strings.utf8      path and text of row 0, path and text of row 1, ...
    ends.int64        [2 N + 1]: 0, then where in strings.utf8 each of these strings ends

Numbers are mapped, so that all processes of a machine share one copy. Strings are read with `pread`, not mapped: the
pages that a mapping touches count as the process's memory, up to the whole file, and a file that shrinks or a network
file system that fails would end the process by a signal, where here it is an OSError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NUMBER_TYPES = {
    "num_frames": "int32",
    "height": "int32",
    "width": "int32",
    "fps": "float64",
    "score_vmafmotion": "float64",
}
_STRINGS, _ENDS = "strings.utf8", "ends.int64"
_SPAN = struct.Struct("<qq")


def file_sizes(columns: list[str], rows: int, string_bytes: int) -> dict[str, int]:
    """Bytes of each file of a folder, by its name."""
    numbers = {_number_file(name): rows * np.dtype(NUMBER_TYPES[name]).itemsize for name in columns}
    return {**numbers, _STRINGS: string_bytes, _ENDS: 8 * (2 * rows + 1)}


class RowWriter:
    """Appends rows to a folder.

    Args:
        folder: exists.
        columns: the numbers that each row has, keys of `NUMBER_TYPES`.
        rows, string_bytes: what to go on after; anything beyond it in the files is cut off.
    """

    def __init__(self, folder: Path, columns: list[str], rows: int = 0, string_bytes: int = 0):
        self.columns, self.rows, self.string_bytes = columns, rows, string_bytes
        self._files = {}
        for name, size in file_sizes(columns, rows, string_bytes).items():
            file = self._files[name] = (folder / name).open("r+b" if rows else "wb")
            file.truncate(size)
            file.seek(0, os.SEEK_END)
        if not rows:
            self._files[_ENDS].seek(0)
            self._files[_ENDS].write(bytes(8))

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, numbers: Mapping[str, NDArray], path: pa.Array, text: pa.Array) -> None:
        """Nulls become empty strings."""
        path, text = (pc.fill_null(column.cast(pa.large_string()), "") for column in (path, text))
        lengths = np.stack([pc.binary_length(path).to_numpy(), pc.binary_length(text).to_numpy()], axis=1)  # [N, 2]
        ends = self.string_bytes + np.cumsum(lengths.reshape(-1), dtype=np.int64)
        rows = pc.binary_join_element_wise(path, text, pa.scalar("", pa.large_string()))
        if len(rows):
            self._files[_STRINGS].write(memoryview(rows.buffers()[2])[: ends[-1] - self.string_bytes])
            self.string_bytes = int(ends[-1])
        self._files[_ENDS].write(ends.astype("<i8", copy=False))
        for name in self.columns:
            values = numbers[name].astype(np.dtype(NUMBER_TYPES[name]).newbyteorder("<"), copy=False)
            self._files[_number_file(name)].write(np.ascontiguousarray(values))
        self.rows += len(path)

    def sync(self) -> None:
        """All that was appended is on the disk when this returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


def map_numbers(folder: Path, column: str, rows: int) -> NDArray:
    """A column of numbers: [rows], read-only, in memory shared with other processes."""
    kind = np.dtype(NUMBER_TYPES[column]).newbyteorder("<")
    return np.asarray(np.memmap(folder / _number_file(column), kind, mode="r", shape=(rows,)))


class StringFile:
    """The paths and texts of a folder of `rows` rows. Processes that fork off may share it."""

    def __init__(self, folder: Path, rows: int):
        self.rows = rows
        self._ends = (folder / _ENDS).open("rb", buffering=0)
        self._strings = (folder / _STRINGS).open("rb", buffering=0)

    def path(self, row: int) -> str:
        return self._read(row, 0)

    def text(self, row: int) -> str:
        return self._read(row, 1)

    def _read(self, row: int, place: int) -> str:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of a table of {self.rows}")
        start, end = _SPAN.unpack(_read_exactly(self._ends, _SPAN.size, 8 * (2 * row + place)))
        return _read_exactly(self._strings, end - start, start).decode()


def _read_exactly(file: FileIO, size: int, start: int) -> bytes:
    """`size` bytes from byte `start` on; a single pread gives at most 2 GiB, and some disks less."""
    read = os.pread(file.fileno(), size, start)
    while len(read) < size:
        more = os.pread(file.fileno(), size - len(read), start + len(read))
        if not more:
            raise OSError(f"'{file.name}' ends at byte {start + len(read):,}, not at {start + size:,}: it was cut")
        read += more
    return read


def _number_file(column: str) -> str:
    return f"{column}.{NUMBER_TYPES[column]}"
