"""The table of training samples: a csv or parquet file, held by column.

Numbers that planning needs are numpy arrays; paths and captions stay in Arrow's buffers and are looked up by row, which
costs neither a Python object per row nor a copy in forked workers.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

TEXT_COLUMNS = ("path", "text")
NUMBER_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
SCORE_COLUMN = "score_vmafmotion"  # optional
# aspect_ratio and resolution follow from height and width: they belong to the format, but are not kept.
_KEPT_NUMBERS = ("num_frames", "height", "width", "fps", SCORE_COLUMN)
_CSV_NULLS = ["", "nan", "NaN", "NAN", "None", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "<NA>"]
_CSV_BLOCK_BYTES = 16 << 20  # the longest row that can be read


class Table:
    """The samples of a data set.

    Args:
        path: .csv or .parquet with columns path, text, num_frames, height, width, aspect_ratio (h/w), resolution (h*w),
            fps and optionally score_vmafmotion, as `scripts/cnv/meta.py` writes it.

    Attributes:
        num_frames, height, width: [N] int32; 0 in all three marks a row that cannot be used.
        fps: [N] float64, frames per second; NaN where unknown (images).
        score: [N] float64 motion score, NaN where unknown, or None without such a column.
        unusable: number of rows that cannot be used, by reason.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table, no rows, or columns that are absent or hold something else than numbers.
    """

    def __init__(self, path: str | os.PathLike):
        self.file = Path(path)
        columns = _read_columns(self.file)
        self._paths, self._texts = columns["path"], columns["text"]
        numbers = {name: _to_numpy(columns[name]) for name in _KEPT_NUMBERS if name in columns}
        fps = numbers["fps"]
        with np.errstate(invalid="ignore"):
            self.fps = np.where((fps > 0) & np.isfinite(fps), fps, np.nan)
        self.score = numbers.get(SCORE_COLUMN)
        self.unusable: dict[str, int] = {}
        usable = self._count("path is empty", _is_filled(self._paths))
        for name in ("num_frames", "height", "width"):
            with np.errstate(invalid="ignore"):
                valid = (numbers[name] >= 1) & (numbers[name] < 2**31)
            usable &= self._count(f"{name} is empty or not positive", valid)
        self.num_frames, self.height, self.width = (
            np.where(usable, numbers[name], 0).astype(np.int32) for name in ("num_frames", "height", "width")
        )

    def __len__(self) -> int:
        return len(self.num_frames)

    def text(self, row: int) -> str:
        """The caption, "" where there is none."""
        text = self._texts[row].as_py()
        return "" if text is None or text in ("nan", "NaN") else text

    def path(self, row: int) -> str:
        """Where the sample's file is. A relative path is looked up in the working directory, then in the table's
        folder."""
        path = self._paths[row].as_py()
        if os.path.isabs(path) or "://" in path or os.path.exists(path):
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

    def _count(self, reason: str, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        invalid = len(valid) - int(np.count_nonzero(valid))
        if invalid:
            self.unusable[reason] = invalid
        return valid


def _read_columns(file: Path) -> dict[str, pa.ChunkedArray]:
    """Path and text as strings, numbers as float64."""
    if not file.exists():
        raise FileNotFoundError(f"dataset.data_path='{file}' does not exist: give a .csv or .parquet table of videos")
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.is_dir() or file.suffix.lower() not in readers:
        kind = "a folder" if file.is_dir() else f"a '{file.suffix}' file"
        raise ValueError(f"dataset.data_path='{file}' is {kind}: a table is one .csv or .parquet file")
    try:
        columns = readers[file.suffix.lower()](file)
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"dataset.data_path='{file}' cannot be read as {file.suffix[1:]}: {reason}") from error
    numbers, problems = {}, []
    for name in (*NUMBER_COLUMNS, SCORE_COLUMN):
        if name in columns:
            try:
                numbers[name] = columns[name].cast(pa.float64())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                problems.append(f"{name} (not a number: {_first_non_number(columns[name])!r})")
        elif name != SCORE_COLUMN:
            problems.append(name)
    missing_texts = [name for name in TEXT_COLUMNS if name not in columns]
    if problems or missing_texts:
        raise ValueError(_column_error(file, missing_texts, problems))
    if not len(columns["path"]):
        raise ValueError(f"dataset.data_path='{file}' has no rows")
    return numbers | {name: _as_strings(columns[name]) for name in TEXT_COLUMNS}


def _column_error(file: Path, missing_texts: list[str], problems: list[str]) -> str:
    message = f"dataset.data_path='{file}' has no usable column {', '.join(missing_texts + problems)}: "
    remedies = []
    if missing_texts:
        remedies.append(f"a table of videos needs {' and '.join(missing_texts)}")
    if problems:
        output = file.with_name(f"{file.stem}_nec{file.suffix}")
        remedies.append(f"add them with `python scripts/cnv/meta.py --input {file} --output {output}`")
    return message + "; ".join(remedies)


def _read_csv(file: Path) -> dict[str, pa.ChunkedArray]:
    parse = pa_csv.ParseOptions(newlines_in_values=True)  # captions hold quotes, commas and line breaks
    read = pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    with pa_csv.open_csv(file, read, parse) as reader:
        present = [name for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS, SCORE_COLUMN) if name in reader.schema.names]

    def read_as(number_type: pa.DataType, **options) -> pa.Table:
        types = {name: pa.string() if name in TEXT_COLUMNS else number_type for name in present}
        convert = pa_csv.ConvertOptions(include_columns=present, column_types=types, null_values=_CSV_NULLS, **options)
        return pa_csv.read_csv(file, read, parse, convert)

    if not present:
        return {}
    try:
        table = read_as(pa.float64())
    except pa.ArrowInvalid:
        table = read_as(pa.string(), strings_can_be_null=True)  # to name every column that is at fault
    return {name: table[name] for name in present}


def _read_parquet(file: Path) -> dict[str, pa.ChunkedArray]:
    with pa_parquet.ParquetFile(file, memory_map=True) as parquet:
        names = (*TEXT_COLUMNS, *NUMBER_COLUMNS, SCORE_COLUMN)
        present = [name for name in names if name in parquet.schema_arrow.names]
        table = parquet.read(columns=present)
    return {name: table[name] for name in present}


def _as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    return column.cast(pa.large_string())


def _first_non_number(column: pa.ChunkedArray) -> object:
    for value in column:
        try:
            value.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return value.as_py()
    return None


def _is_filled(strings: pa.ChunkedArray) -> NDArray[np.bool_]:
    return pc.fill_null(pc.greater(pc.binary_length(strings), 0), False).to_numpy()


def _to_numpy(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A float64 column, nulls as NaN."""
    return pc.fill_null(column, float("nan")).to_numpy().astype(np.float64, copy=False)
