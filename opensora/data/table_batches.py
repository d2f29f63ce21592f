"""Tables of videos read batch by batch, csv and parquet: memory does not grow with the table.

What training uses of a batch is split off by `training_columns`; the other columns pass through as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

TEXT_COLUMNS = ("path", "text")
NUMBER_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
SCORE_COLUMN = "score_vmafmotion"  # optional
KNOWN_COLUMNS = (*TEXT_COLUMNS, *NUMBER_COLUMNS, SCORE_COLUMN)
# aspect_ratio and resolution follow from height and width: they belong to the format, but are not kept.
_SIZE_COLUMNS = ("num_frames", "height", "width")
_CSV_NULLS = ["", "nan", "NaN", "NAN", "None", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "<NA>"]
# A block must hold a whole row, and Arrow reads 32 of them ahead: large ones are for tables that need them.
_CSV_BLOCK_BYTES = (1 << 20, 1 << 24)
_PARQUET_BATCH_ROWS = 1 << 14
_PARQUET_BUFFER_BYTES = 1 << 20  # read of a column at once: without it, a whole row group is


class TrainingColumns(NamedTuple):
    """What training uses of a batch of rows.

    Attributes:
        numbers: num_frames, height, width as int32, 0 in all three for a row that cannot be used; fps as float64, NaN
            where unknown; score_vmafmotion as float64, if the table has it. All [N].
        path, text: [N] strings, which may be null.
        unusable: rows that cannot be used, by reason; a row may have several.
    """

    numbers: dict[str, NDArray]
    path: pa.Array
    text: pa.Array
    unusable: Counter[str]


class VideoTable:
    """A csv or parquet file with the columns that training needs.

    Args:
        file: the table.
        name: what messages call it, e.g. "dataset.data_path='videos.csv'".

    Attributes:
        schema: of all columns. In a csv, the numbers that training needs are float64 and everything else is text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table, or columns that are absent or (while reading) hold something else than numbers.
    """

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name
        if not file.exists():
            raise FileNotFoundError(f"{name} does not exist: give a .csv or .parquet table of videos")
        if file.is_dir() or file.suffix.lower() not in (".csv", ".parquet"):
            kind = "a folder" if file.is_dir() else f"a '{file.suffix}' file"
            raise ValueError(f"{name} is {kind}: a table is one .csv or .parquet file")
        self._format = _Csv(file) if file.suffix.lower() == ".csv" else _Parquet(file)
        with self._readable():
            self.schema = self._format.read_schema()
        names = self.schema.names
        twice = sorted({column for column in names if names.count(column) > 1})
        if twice:
            raise ValueError(f"{name} has more than one column named '{twice[0]}': rename one")
        missing = [column for column in KNOWN_COLUMNS if column not in names and column != SCORE_COLUMN]
        if missing:
            raise ValueError(self._column_error(missing, self._non_numbers()))

    def count_rows(self) -> int:
        """The number of rows; a csv is read through for it, and so checked in whole."""
        with self._readable():
            return self._format.count_rows()

    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows from row `start` on; of all columns, or of those named."""
        columns = self.schema.names if columns is None else columns
        try:
            for batch in self._format.batches(columns, start):
                _check_numbers(batch)
                yield batch
        except (pa.ArrowException, OSError) as error:
            non_numbers = self._non_numbers()
            if non_numbers:
                raise ValueError(self._column_error([], non_numbers)) from None
            raise ValueError(self._unreadable(error)) from error

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ValueError(self._unreadable(error)) from error

    def _unreadable(self, error: Exception) -> str:
        return f"{self.name} cannot be read as {self.file.suffix[1:]}: {' '.join(str(error).split())}"

    def _non_numbers(self) -> dict[str, object]:
        """The first value of each column of numbers that is not one; none if the table can't be read at all."""
        found: dict[str, object] = {}
        names = [name for name in (*NUMBER_COLUMNS, SCORE_COLUMN) if name in self.schema.names]
        try:
            for batch in self._format.unparsed_batches(names):
                for name in names:
                    if name not in found and not _is_number(batch[name]):
                        found[name] = next(value.as_py() for value in batch[name] if not _is_number(value))
        except (pa.ArrowException, OSError):
            return {}
        return found

    def _column_error(self, missing: list[str], non_numbers: dict[str, object]) -> str:
        """One line that names every column at fault and what to do."""
        texts = [name for name in TEXT_COLUMNS if name in missing]
        numbers = [
            f"{name} (not a number: {non_numbers[name]!r})" if name in non_numbers else name
            for name in KNOWN_COLUMNS
            if name not in texts and (name in missing or name in non_numbers)
        ]
        remedies = []
        if texts:
            remedies.append(f"a table of videos needs {' and '.join(texts)}")
        if numbers:
            output = self.file.with_name(f"{self.file.stem}_nec{self.file.suffix}")
            remedies.append(f"add them with `python scripts/cnv/meta.py --input {self.file} --output {output}`")
        return f"{self.name} has no usable column {', '.join(texts + numbers)}: {'; '.join(remedies)}"


def training_columns(batch: pa.RecordBatch) -> TrainingColumns:
    """Split off what training uses; the batch has all of `KNOWN_COLUMNS`, but for the optional one."""
    unusable: Counter[str] = Counter()

    def check(reason: str, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
        invalid = len(valid) - int(np.count_nonzero(valid))
        if invalid:
            unusable[reason] += invalid
        return valid

    path, text = (_as_strings(batch[name]) for name in TEXT_COLUMNS)
    usable = check("path is empty", _is_filled(path))
    sizes = {name: _as_numbers(batch[name]) for name in _SIZE_COLUMNS}
    for name, values in sizes.items():
        with np.errstate(invalid="ignore"):
            usable = usable & check(f"{name} is empty or not positive", (values >= 1) & (values < 2**31))
    numbers = {name: np.where(usable, values, 0).astype(np.int32) for name, values in sizes.items()}
    fps = _as_numbers(batch["fps"])
    with np.errstate(invalid="ignore"):
        numbers["fps"] = np.where((fps > 0) & np.isfinite(fps), fps, np.nan)
    if SCORE_COLUMN in batch.schema.names:
        numbers[SCORE_COLUMN] = _as_numbers(batch[SCORE_COLUMN])
    return TrainingColumns(numbers, path, text, unusable)


class _Csv:
    """RFC 4180: fields may hold quotes, commas and line breaks."""

    def __init__(self, file: Path):
        self.file = file

    def read_schema(self) -> pa.Schema:
        for block_bytes in _CSV_BLOCK_BYTES:
            try:
                with self._open(pa_csv.ConvertOptions(), block_bytes) as reader:
                    return pa.schema([(name, _csv_type(name)) for name in reader.schema.names])
            except pa.ArrowInvalid as error:
                _raise_unless_too_long(error, block_bytes)
        raise AssertionError("unreachable")

    def count_rows(self) -> int:
        names = self.read_schema().names
        return sum(len(batch) for batch in self._read(names[:1], {names[0]: pa.string()}))

    def batches(self, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        return _skip(self._read(columns, {name: _csv_type(name) for name in columns}), start)

    def unparsed_batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if not columns:
            return iter(())
        return self._read(columns, dict.fromkeys(columns, pa.string()), strings_can_be_null=True)

    def _read(self, columns: list[str], types: dict[str, pa.DataType], **options) -> Iterator[pa.RecordBatch]:
        convert = pa_csv.ConvertOptions(include_columns=columns, column_types=types, null_values=_CSV_NULLS, **options)
        done = 0
        for block_bytes in _CSV_BLOCK_BYTES:
            try:
                with self._open(convert, block_bytes) as reader:
                    for batch in _skip(reader, done):
                        yield batch
                        done += len(batch)
                return
            except pa.ArrowInvalid as error:
                _raise_unless_too_long(error, block_bytes)

    def _open(self, convert: pa_csv.ConvertOptions, block_bytes: int) -> pa_csv.CSVStreamingReader:
        read = pa_csv.ReadOptions(block_size=block_bytes, use_threads=False)  # threads would parse far ahead
        return pa_csv.open_csv(self.file, read, pa_csv.ParseOptions(newlines_in_values=True), convert)


class _Parquet:
    def __init__(self, file: Path):
        self.file = file

    def read_schema(self) -> pa.Schema:
        with pa_parquet.ParquetFile(self.file) as parquet:
            return parquet.schema_arrow

    def count_rows(self) -> int:
        with pa_parquet.ParquetFile(self.file) as parquet:
            return parquet.metadata.num_rows

    def batches(self, columns: list[str], start: int) -> Iterator[pa.RecordBatch]:
        with pa_parquet.ParquetFile(self.file, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if start >= rows:
                    start -= rows
                    continue
                # threads would decode all columns of the row group ahead
                batches = parquet.iter_batches(_PARQUET_BATCH_ROWS, [group], columns, use_threads=False)
                yield from _skip(batches, start)
                start = 0

    def unparsed_batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        return self.batches(columns, 0)


def _skip(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """All rows but the first ones."""
    for batch in batches:
        if rows < len(batch):
            yield batch.slice(rows)
        rows = max(0, rows - len(batch))


def _raise_unless_too_long(error: pa.ArrowInvalid, block_bytes: int) -> None:
    """Raise again what larger blocks don't help against."""
    if "straddl" not in str(error) or block_bytes == _CSV_BLOCK_BYTES[-1]:
        raise error


def _csv_type(name: str) -> pa.DataType:
    return pa.float64() if _is_number_column(name) else pa.string()


def _is_number_column(name: str) -> bool:
    return name in NUMBER_COLUMNS or name == SCORE_COLUMN


def _check_numbers(batch: pa.RecordBatch) -> None:
    """ArrowException if a column of numbers holds something else."""
    for name in batch.schema.names:
        if _is_number_column(name):
            batch[name].cast(pa.float64())


def _is_number(value: pa.Array | pa.Scalar) -> bool:
    try:
        value.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _as_strings(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    return column.cast(pa.large_string())


def _as_numbers(column: pa.Array) -> NDArray[np.float64]:
    """Nulls as NaN."""
    return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)


def _is_filled(strings: pa.Array) -> NDArray[np.bool_]:
    return pc.fill_null(pc.greater(pc.binary_length(strings), 0), False).to_numpy(zero_copy_only=False)
