"""The table of training samples, held by column.

A csv or parquet file is read into memory: numbers that planning needs as numpy arrays, paths and captions in Arrow's
buffers, which costs neither a Python object per row nor a copy in forked workers. Of a table in shards nothing is
read: numbers are mapped, and paths and captions are looked up in their files.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opensora.data.row_files import StringFile, map_numbers
from opensora.data.shards import ROW_FOLDER, ShardIndex, find_shards
from opensora.data.table_batches import KNOWN_COLUMNS, SCORE_COLUMN, VideoTable, training_columns

_ROWS_TRIED = 256


class Table:
    """The samples of a data set.

    Args:
        path: .csv or .parquet with columns path, text, num_frames, height, width, aspect_ratio (h/w), resolution (h*w),
            fps and optionally score_vmafmotion, as `scripts/cnv/meta.py` writes it; or the folder of its shards, as
            `scripts/cnv/shard.py` makes it.
        memory_efficient: read a .csv or .parquet file's shards, which are in the folder beside it, and not the file.

    Attributes:
        num_frames, height, width: [N] int32; 0 in all three marks a row that cannot be used.
        fps: [N] float64, frames per second; NaN where unknown (images).
        score: [N] float64 motion score, NaN where unknown, or None without such a column.
        unusable: number of rows that cannot be used, by reason.

    Raises:
        FileNotFoundError: no such file, or no shards of it.
        ValueError: not a table, no rows, columns that are absent or hold something else than numbers, or shards that
            are not whole or of another table.
    """

    def __init__(self, path: str | os.PathLike, memory_efficient: bool = False):
        self.file = Path(path)
        folder = find_shards(self.file, memory_efficient)
        self._rows = _LoadedRows(self.file) if folder is None else _ShardedRows(folder)
        numbers = self._rows.numbers
        self.num_frames, self.height, self.width = (numbers[name] for name in ("num_frames", "height", "width"))
        self.fps, self.score = numbers["fps"], numbers.get(SCORE_COLUMN)
        self.unusable: dict[str, int] = self._rows.unusable

    def __len__(self) -> int:
        return len(self.num_frames)

    def text(self, row: int) -> str:
        """The caption, "" where there is none."""
        text = self._rows.text(row)
        return "" if text in ("nan", "NaN") else text

    def listed_path(self, row: int) -> str:
        """The sample's file as the table names it."""
        return self._rows.path(row)

    @cached_property
    def origin(self) -> str:
        """Where the paths of the table begin: the folder that the first relative one of some, spread over all rows, is
        relative to; "" if there is none."""
        for row in range(0, len(self), max(1, len(self) // _ROWS_TRIED)):
            listed = self.listed_path(row)
            if listed and not _is_complete(listed):
                return os.path.realpath(os.path.abspath(self.path(row)).removesuffix(os.path.normpath(listed)))
        return ""

    def path(self, row: int) -> str:
        """Where the sample's file is. A relative path is looked up in the working directory, then in the table's
        folder."""
        path = self.listed_path(row)
        if _is_complete(path) or os.path.exists(path):
            return path
        beside = self.file.parent / path
        return str(beside) if beside.exists() else path

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the order of training depends on: rows, sizes, lengths and rates, not paths or captions."""
        digest = hashlib.sha256(str(len(self)).encode())
        for column in (self.num_frames, self.height, self.width):
            digest.update(column.astype("<i4", copy=False))
        digest.update(self.fps.astype("<f8", copy=False))
        return digest.hexdigest()[:16]


def _is_complete(path: str) -> bool:
    return os.path.isabs(path) or "://" in path


class _LoadedRows:
    """The rows of a file, in memory. Batches are kept as they come: putting them together would need room for two."""

    def __init__(self, file: Path):
        name = f"dataset.data_path='{file}'"
        table = VideoTable(file, name)
        known = [column for column in KNOWN_COLUMNS if column in table.schema.names]
        batches, unusable = [], Counter()
        for batch in table.batches(known):
            batches.append(training_columns(batch))
            unusable.update(batches[-1].unusable)
        if not batches:
            raise ValueError(f"{name} has no rows")
        self.unusable = dict(unusable)
        self.numbers: dict[str, NDArray] = {
            column: np.concatenate([batch.numbers[column] for batch in batches]) for column in batches[0].numbers
        }
        self._paths = pa.chunked_array([batch.path for batch in batches])
        self._texts = pa.chunked_array([batch.text for batch in batches])

    def path(self, row: int) -> str:
        return self._paths[row].as_py() or ""

    def text(self, row: int) -> str:
        return self._texts[row].as_py() or ""


class _ShardedRows:
    """The rows of a folder of shards, on the disk."""

    def __init__(self, folder: Path):
        index = ShardIndex.load(folder)
        self.unusable = index.unusable
        self.numbers = {name: map_numbers(folder / ROW_FOLDER, name, index.rows) for name in index.numbers}
        strings = StringFile(folder / ROW_FOLDER, index.rows)
        self.path, self.text = strings.path, strings.text
