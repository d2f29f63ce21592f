"""A table cut into shards, for training on more rows than fit into memory: the work of `scripts/cnv/shard.py`.

Beside `videos.parquet` the folder `videos/` holds

    00001.parquet ...  the table's rows with all their columns, so many per file
    rows/              the columns that training reads, see `row_files`
    index.json         which rows are where, and of which table

The index is written anew after each shard. An interrupted run goes on after the last shard that it lists.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from opensora.common import rank
from opensora.data.row_files import NUMBER_TYPES, RowWriter, file_sizes
from opensora.data.table_batches import VideoTable, training_columns
from opensora.durable import HeldError, hold, put_in_place, write_whole
from opensora.fingerprint import content_hash, sample_hash

INDEX_FILE, ROW_FOLDER = "index.json", "rows"
ROWS_PER_SHARD = 250_000
_FORMAT = "opensora-shards-1"


@dataclass
class ShardIndex:
    """What is in a folder of shards.

    Attributes:
        source: name, bytes, modified_ns and sample_sha256 of the table that was cut; and sha256 when all is done.
        rows: of the whole table.
        shards: file, first_row and rows of each shard.
        finished: how many shards are, from the first one on.
        columns: type of each column of the table, by its name.
        numbers: the columns in `rows/` besides path and text.
        string_bytes: length of the strings of the finished shards.
        unusable: rows of the finished shards that cannot be used, by reason.
    """

    source: dict[str, Any]
    rows: int
    columns: dict[str, str]
    numbers: list[str]
    shards: list[dict[str, Any]]
    finished: int = 0
    string_bytes: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    format: str = _FORMAT

    @property
    def complete(self) -> bool:
        return self.finished == len(self.shards)

    @property
    def rows_done(self) -> int:
        return sum(shard["rows"] for shard in self.shards[: self.finished])

    @classmethod
    def load(cls, folder: Path) -> ShardIndex | None:
        """The index of a folder; None if it has none that is of this format."""
        try:
            values = json.loads((folder / INDEX_FILE).read_text())
            return cls(**values) if values["format"] == _FORMAT else None
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            return None

    def save(self, folder: Path) -> None:
        write_whole(folder / INDEX_FILE, json.dumps(asdict(self), indent=1))

    def damage(self, folder: Path) -> str | None:
        """What is missing in `rows/` of the finished shards; None if nothing is."""
        if not self.finished:
            return None
        for name, size in file_sizes(self.numbers, self.rows_done, self.string_bytes).items():
            file = folder / ROW_FOLDER / name
            found = file.stat().st_size if file.is_file() else 0
            if found < size or (self.complete and found != size):
                return f"{ROW_FOLDER}/{name} has {found:,} bytes instead of {size:,}"
        return None


def shard_folder(table: Path) -> Path:
    """Where the shards of a table are."""
    return table.with_name(table.stem)


def find_shards(path: Path, needed: bool) -> Path | None:
    """The shards that `dataset.data_path` means: of a folder itself, of a file those beside it if they are `needed`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not whole, or of another table.
    """
    name = f"dataset.data_path='{path}'"
    if path.is_dir():
        if ShardIndex.load(path) is None:
            raise ValueError(
                f"{name} is a folder without shards: give a .csv or .parquet table, or the folder that "
                "scripts/cnv/shard.py makes of it"
            )
        _check_whole(path, f"python scripts/cnv/shard.py TABLE, of which {name} are the shards")
        return path
    if not needed:
        return None
    folder, command = shard_folder(path), f"python scripts/cnv/shard.py {path}"
    index = ShardIndex.load(folder)
    if index is None:
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist, nor do its shards in '{folder}'")
        raise FileNotFoundError(
            f"dataset.memory_efficient=True reads shards, and {name} has none in '{folder}': make them with `{command}`"
        )
    _check_whole(folder, command)
    if path.exists() and not _is_of_shards(path, folder, index):
        _refuse_other_name(folder, path, index)
        raise ValueError(
            f"{name} has changed since its shards in '{folder}' were made: make them anew with `{command}`"
        )
    return folder


def _check_whole(folder: Path, command: str) -> None:
    index = ShardIndex.load(folder)
    if not index.complete:
        done = f"{index.finished} of {len(index.shards)}"
        raise ValueError(f"'{folder}' has {done} shards: finish them with `{command}`")
    if damage := index.damage(folder):
        raise ValueError(f"the shards in '{folder}' are damaged ({damage}): make them anew with `{command}`")


def write_shards(
    table: Path,
    num_shards: int | None = None,
    rows_per_shard: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardIndex:
    """Cut a table into the folder beside it. Finished shards of the same table are kept.

    Args:
        table: .csv or .parquet, with the columns that training needs.
        num_shards, rows_per_shard: how to cut; at most one of them. By default as the run to go on with, or else every
            `ROWS_PER_SHARD` rows.
        progress: is told how many rows are done, and of how many.

    Raises:
        FileNotFoundError, ValueError: the table cannot be read or written as asked, in one line.
    """
    name = f"table '{table}'"
    source = VideoTable(table, name)
    folder = shard_folder(table)
    _claim(folder)
    with _held(folder):
        _refuse_other_table(folder, table, ShardIndex.load(folder))
        index = _to_go_on_with(folder, table, num_shards, rows_per_shard)
        if index is None:
            index = _plan(source, num_shards, rows_per_shard)
            _clear(folder)
            index.save(folder)
        progress(index.rows_done, index.rows)
        if not index.complete:
            _write(source, folder, index, progress)
    return index


def _plan(source: VideoTable, num_shards: int | None, rows_per_shard: int | None) -> ShardIndex:
    described = _describe(source.file)  # before the rows are counted: a table that changes meanwhile is another one
    rows = source.count_rows()
    if not rows:
        raise ValueError(f"{source.name} has no rows")
    columns = {column.name: str(column.type) for column in source.schema}
    numbers = [name for name in NUMBER_TYPES if name in columns]
    return ShardIndex(described, rows, columns, numbers, _plan_shards(rows, num_shards, rows_per_shard))


def _plan_shards(rows: int, num_shards: int | None, rows_per_shard: int | None) -> list[dict[str, Any]]:
    if num_shards is None:
        bounds = [*range(0, rows, rows_per_shard or ROWS_PER_SHARD), rows]
    else:
        num_shards = min(num_shards, rows)
        bounds = [rows * i // num_shards for i in range(num_shards + 1)]
    return [
        {"file": f"{number:05}.parquet", "first_row": first, "rows": end - first}
        for number, (first, end) in enumerate(pairwise(bounds), start=1)
    ]


def _write(source: VideoTable, folder: Path, index: ShardIndex, progress: Callable[[int, int], None]) -> None:
    """Write the shards that are missing, and the index after each."""
    (folder / ROW_FOLDER).mkdir(exist_ok=True)
    done, unusable = index.rows_done, Counter(index.unusable)
    ends = [shard["first_row"] + shard["rows"] for shard in index.shards[index.finished :]]
    pieces = _cut(source.batches(start=done), done, ends)
    with RowWriter(folder / ROW_FOLDER, index.numbers, done, index.string_bytes) as writer:
        for shard, end in zip(index.shards[index.finished :], ends, strict=True):
            with _parquet_writer(folder / shard["file"], source.schema) as parquet:
                while writer.rows < end:
                    batch = next(pieces, None)
                    if batch is None:
                        raise ValueError(f"{source.name} changed while it was read: run the command again")
                    parquet.write_batch(batch)
                    columns = training_columns(batch)
                    writer.append(columns.numbers, columns.path, columns.text)
                    unusable.update(columns.unusable)
                    progress(writer.rows, index.rows)
            writer.sync()
            index.finished += 1
            index.string_bytes, index.unusable = writer.string_bytes, dict(unusable)
            if index.complete:
                content_sha256 = content_hash(source.file)
                if _describe(source.file) != index.source:
                    raise ValueError(f"{source.name} changed while it was read: run the command again")
                index.source["sha256"] = content_sha256
            index.save(folder)


def _cut(batches: Iterator[pa.RecordBatch], row: int, ends: list[int]) -> Iterator[pa.RecordBatch]:
    """The same rows, of which the first is row `row`, in batches that don't reach over an end."""
    batch = next(batches, None)
    for end in ends:
        while batch is not None and row < end:
            piece, batch = batch.slice(0, end - row), batch.slice(end - row)
            yield piece
            row += len(piece)
            batch = batch if len(batch) else next(batches, None)


@contextmanager
def _parquet_writer(file: Path, schema: pa.Schema) -> Iterator[pa_parquet.ParquetWriter]:
    """The file is there when all of it is."""
    draft = file.with_name(f".{file.name}.part")
    try:
        with pa_parquet.ParquetWriter(draft, schema) as writer:
            yield writer
        put_in_place(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _to_go_on_with(folder: Path, table: Path, num_shards: int | None, rows_per_shard: int | None) -> ShardIndex | None:
    """The index of an earlier run on the same table that wanted the same; None if all is to be done."""
    index = ShardIndex.load(folder)
    if index is None or not _is_same_content(table, index.source) or index.damage(folder):
        return None
    given = num_shards is not None or rows_per_shard is not None
    if given and _plan_shards(index.rows, num_shards, rows_per_shard) != index.shards:
        return None
    if not all((folder / shard["file"]).is_file() for shard in index.shards[: index.finished]):
        return None
    _note_copy(table, folder, index)
    return index


def _is_of_shards(table: Path, folder: Path, index: ShardIndex) -> bool:
    """Whether shards are of a table, for training. One of another time is read whole by rank 0 alone, whose error ends
    all; and once, if the folder can be written to."""
    if rank() != 0:
        return _has_same_samples(_describe(table), index.source)
    if not _is_same_content(table, index.source):
        return False
    if table.stat().st_mtime_ns != index.source["modified_ns"]:
        with suppress(OSError, ValueError), _held(folder):
            if ShardIndex.load(folder) == index:
                _note_copy(table, folder, index)
    return True


def _note_copy(table: Path, folder: Path, index: ShardIndex) -> None:
    """Of a table with the same content, so that it need not be compared again."""
    described = index.source | _describe(table)
    if described != index.source:
        index.source = described
        index.save(folder)


def _refuse_other_table(folder: Path, table: Path, index: ShardIndex | None) -> None:
    """ValueError if the shards are of a table of another name, whose folder this one's would be too."""
    if index is not None and index.source["name"] != table.name and not _is_same_content(table, index.source):
        _refuse_other_name(folder, table, index)


def _refuse_other_name(folder: Path, table: Path, index: ShardIndex) -> None:
    if index.source["name"] != table.name:
        raise ValueError(
            f"folder '{folder}' holds the shards of '{index.source['name']}', not of '{table.name}': rename one of the "
            "two tables, or remove the folder"
        )


def _claim(folder: Path) -> None:
    """Make the folder. One that exists may hold other files (the videos), but none that would be replaced."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder '{folder}' for the shards cannot be made: {error.strerror}") from None
    if ShardIndex.load(folder) is None:
        taken = [folder / INDEX_FILE, folder / ROW_FOLDER, *_numbered(folder)]
        if taken := [file.name for file in taken if file.exists()]:
            raise ValueError(f"folder '{folder}' holds {taken[0]}, which is of another origin: move or rename it first")


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote. Runs that train on it keep what they have open."""
    index = ShardIndex.load(folder)
    if index is not None:
        for name in [shard["file"] for shard in index.shards]:
            (folder / name).unlink(missing_ok=True)
            (folder / f".{name}.part").unlink(missing_ok=True)
        shutil.rmtree(folder / ROW_FOLDER, ignore_errors=True)
        (folder / INDEX_FILE).unlink()


def _numbered(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.parquet") if file.stem.isdecimal() and len(file.stem) >= 5]


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One run at a time writes to a folder; the lock ends with the process."""
    try:
        held = hold(folder / ".lock")
    except HeldError as error:
        raise ValueError(
            f"folder '{folder}' is being written by another run of scripts/cnv/shard.py ({error.holder})"
        ) from None
    with held:
        yield


def _describe(table: Path) -> dict[str, Any]:
    """What tells a table from another one, read in a fraction of a second whatever its size."""
    status = table.stat()
    return {
        "name": table.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "sample_sha256": sample_hash(table),
    }


def _is_same_content(table: Path, source: dict[str, Any]) -> bool:
    """Whether a table is what `ShardIndex.source` describes. One of another time, which may be a copy, is read whole;
    it cannot be said of shards that are not all done."""
    described = _describe(table)
    if not _has_same_samples(described, source):
        return False
    return described["modified_ns"] == source["modified_ns"] or source.get("sha256") == content_hash(table)


def _has_same_samples(described: dict[str, Any], source: dict[str, Any]) -> bool:
    return all(described[key] == source[key] for key in ("bytes", "sample_sha256"))
