"""Tables read and written in chunks of rows, csv and parquet: memory does not grow with the table.

All columns are kept, and text is taken as it is. Csv is UTF-8, its fields may hold quotes, commas and line breaks
(RFC 4180).
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pa_parquet

SUFFIXES = (".csv", ".parquet")
# Fields that are numbers and lose nothing by being read as one: "007", "1_000" and long identifiers are text.
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?|nan", re.IGNORECASE)
# A row that no table has: read after the last line, it is still a row of its own unless a quoted field is open.
END_OF_TABLE = "\x1eend of table\x1e"


class TableError(ValueError):
    """A table that cannot be read or written as it was asked for; one line for the user."""


class Chunk(NamedTuple):
    """Some rows in their order; `malformed` says of rows, by their place in the chunk, what is wrong with them."""

    rows: pa.Table
    malformed: dict[int, str]


def open_table(path: Path, parse: bool = False, keep_text: Collection[str] = ()) -> TableReader:
    """A reader of the table with its `schema`, its number of rows `num_rows`, and `chunks(size)`.

    Args:
        parse: columns of a csv that hold nothing but numbers become numbers, unless they are in `keep_text`.

    Raises:
        FileNotFoundError, TableError: there is no table to be read, in one line.
    """
    suffix = table_suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"table '{path}' does not exist")
    if not path.is_file():
        raise TableError(f"table '{path}' is not a file")
    reader = CsvReader(path, parse, keep_text) if suffix == ".csv" else ParquetReader(path)
    names = reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"table '{path}' has more than one column named '{twice[0]}': rename one")
    return reader


def create_table(path: Path, schema: pa.Schema, suffix: str) -> TableWriter:
    """A writer with `write(rows)`, to be used in a `with` statement; the format follows `suffix`, not the path."""
    return CsvWriter(path, schema) if suffix == ".csv" else ParquetWriter(path, schema)


def table_suffix(path: Path) -> str:
    """The format of a table by its name; TableError if it is none of SUFFIXES."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TableError(f"table '{path}' is of an unknown kind: its name must end in {' or '.join(SUFFIXES)}")
    return suffix


class CsvReader:
    """Rows of a csv file. Blank lines are skipped; a row with too few fields is filled up with empty ones."""

    def __init__(self, path: Path, parse: bool, keep_text: Collection[str]):
        self.path = path
        rows = self._rows()
        self.names = next(rows, None)
        if self.names is None:
            raise TableError(f"table '{path}' is empty: it has no header line")
        self.num_rows, types = _survey(rows, [parse and name not in keep_text for name in self.names])
        self.schema = pa.schema(list(zip(self.names, types, strict=True)))

    def chunks(self, size: int) -> Iterator[Chunk]:
        rows = islice(self._rows(), 1, None)
        while block := list(islice(rows, size)):
            yield self._to_chunk(block)

    def _to_chunk(self, block: list[list[str]]) -> Chunk:
        width, malformed = len(self.names), {}
        for i, row in enumerate(block):
            if len(row) > width:
                malformed[i] = f"malformed row: {len(row)} fields where the header has {width}"
                block[i] = [*row[: width - 1], ",".join(row[width - 1 :])]
            elif len(row) < width:
                block[i] = row + [""] * (width - len(row))
        columns = zip(*block, strict=True)
        arrays = [_to_array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        return Chunk(pa.Table.from_arrays(arrays, schema=self.schema), malformed)

    def _rows(self) -> Iterator[list[str]]:
        """The header and the rows; what is wrong with the file's text becomes a TableError."""
        csv.field_size_limit(sys.maxsize)
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(chain(file, [END_OF_TABLE]))
            try:
                for row in reader:
                    if row == [END_OF_TABLE]:
                        return
                    if row:
                        yield row
            except UnicodeDecodeError as error:
                raise TableError(
                    f"table '{self.path}' is not UTF-8 ({error.reason}): convert it, e.g. with iconv"
                ) from None
            except csv.Error as error:
                raise TableError(f"table '{self.path}', line {reader.line_num}: {error}") from None
        raise TableError(f"table '{self.path}' ends within a quoted field: a quote is not closed")


def _survey(rows: Iterable[list[str]], parse: list[bool]) -> tuple[int, list[pa.DataType]]:
    """(number of rows, type of each column): of one to `parse`, int64 or float64 if every filled field of it is one."""
    types: list[pa.DataType | None] = [None if flag else pa.string() for flag in parse]
    parsed = [i for i, flag in enumerate(parse) if flag]
    count = 0
    for row in rows:
        count += 1
        for i in parsed:
            if i < len(row) and row[i] and types[i] != pa.string():
                types[i] = _widen(types[i], row[i])
    return count, [kind or pa.string() for kind in types]


def _widen(kind: pa.DataType | None, field: str) -> pa.DataType:
    """The narrowest type that a column of type `kind` (None: nothing seen yet) can have with this field in it."""
    if kind in (None, pa.int64()) and INTEGER.fullmatch(field):
        return pa.int64()
    return pa.float64() if NUMBER.fullmatch(field) else pa.string()


def _to_array(column: Iterable[str], kind: pa.DataType) -> pa.Array:
    """Text as it is; of a column of numbers, an empty field is null."""
    array = pa.array(column, pa.string())
    return array if kind == pa.string() else pc.if_else(pc.equal(array, ""), None, array).cast(kind)


class ParquetReader:
    """Rows of a parquet file, their types and the file's metadata kept."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with pa_parquet.ParquetFile(path) as file:
                self.schema, self.num_rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"table '{path}' is not a parquet file: {_one_line(error)}") from None

    def chunks(self, size: int) -> Iterator[Chunk]:
        try:
            with pa_parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(size):
                    yield Chunk(pa.Table.from_batches([batch]), {})
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"table '{self.path}' is damaged: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class CsvWriter:
    """Writes nulls as empty fields, everything else as Python does."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.file: TextIO = path.open("w", encoding="utf-8", newline="")
        self.plain = csv.writer(self.file, lineterminator="\n")
        # Python before 3.13 leaves a carriage return unquoted, and readers take it for the end of the row.
        self.quoting = csv.writer(self.file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self.plain.writerow(schema.names)

    def __enter__(self) -> CsvWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, rows: pa.Table) -> None:
        for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            returns = any(isinstance(value, str) and "\r" in value for value in row)
            (self.quoting if returns else self.plain).writerow(row)


class ParquetWriter:
    """A row group for each chunk."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.file = pa_parquet.ParquetWriter(path, schema)

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, rows: pa.Table) -> None:
        if len(rows):
            self.file.write_table(rows)


TableReader = CsvReader | ParquetReader
TableWriter = CsvWriter | ParquetWriter
