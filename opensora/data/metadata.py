"""Adds to a table of files what bucketing needs to know of them: the work of `scripts/cnv/meta.py`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from opensora.data.probe import VideoFacts
from opensora.data.probe_files import FileProber, file_prober
from opensora.data.probe_journal import ProbeJournal
from opensora.data.table_stream import Chunk, TableError, TableWriter, create_table, open_table, table_suffix
from opensora.durable import put_in_place

ADDED = pa.schema(
    [
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("fps", pa.float64()),
        ("num_frames", pa.int64()),
        ("aspect_ratio", pa.float64()),
        ("resolution", pa.int64()),
    ]
)
# Rows that are read and written at a time, for each worker.
ROWS_PER_WORKER = 2048
# Seconds that a file may take: a header is read in a moment, of an hour in 4K all pictures are decoded in many minutes.
LONGEST, LONGEST_VERIFY = 300.0, 7200.0


class Summary(NamedTuple):
    """What became of the rows: those left out are counted by reason and listed, with all columns, in a file."""

    written: int
    rejected: Counter[str]
    rejected_path: Path

    def describe_rejected(self) -> str:
        """For example "3 truncated, 2 file not found"."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.most_common())


def add_metadata(
    source: Path, output: Path, num_workers: int | None = None, verify: bool = False, longest: float | None = None
) -> Summary:
    """Write the table `source` to `output` with the columns height, width, fps, num_frames, aspect_ratio (height /
    width) and resolution (height * width) of the file that each row's `path` names.

    The other columns and the order of the rows stay; columns of these names are replaced where they are. An image has
    one frame and an empty fps. A relative path starts from the working directory, or else from the table's folder; it
    is not rewritten. Rows whose file cannot be used go to `<output>.rejected.csv` with the reason. Both files appear
    when all is done, or not at all. What was found so far is kept in `.<output>.progress`: a run that was interrupted
    does not read those files again.

    Args:
        source, output: .csv or .parquet.
        num_workers: processes; None: one for each core, 0: none but this one.
        verify: decode all pictures, to reject files with damaged ones.
        longest: seconds that a file may take a worker process; None: LONGEST, or with `verify` LONGEST_VERIFY.

    Raises:
        FileNotFoundError, TableError: the table cannot be read or written as asked, or no row of it can be used; then
            the list of rejected rows is written nevertheless.
    """
    suffix = table_suffix(output)
    if output.exists() and source.exists() and output.samefile(source):
        raise TableError(f"output '{output}' is the input: give it another name")
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 0:
        raise TableError(f"num_workers={num_workers} is negative: 0 is this process alone")
    if longest is None:
        longest = LONGEST_VERIFY if verify else LONGEST
    if not longest > 0:
        raise TableError(f"timeout={longest:g} must be more than 0 seconds")
    reader = open_table(source, parse=suffix == ".parquet", keep_text=("path", "text"))
    if "path" not in reader.schema.names:
        raise TableError(f"table '{source}' has no column 'path': it has {', '.join(reader.schema.names)}")
    if reader.num_rows == 0:
        raise TableError(f"table '{source}' has no rows")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TableError(f"output '{output}' cannot be written: '{error.filename}': {error.strerror}") from None
    rejected_path = Path(f"{output}.rejected.csv")
    progress = output.with_name(f".{output.name}.progress")
    with (
        ProbeJournal(progress, source, verify) as journal,
        _draft(output) as draft,
        _draft(rejected_path) as rejected_draft,
    ):
        with (
            create_table(draft, _with_facts(reader.schema.empty_table(), []).schema, suffix) as accepted,
            create_table(rejected_draft, _with_reasons(reader.schema.empty_table(), []).schema, ".csv") as rejected,
            file_prober(source.parent, num_workers, reader.num_rows, longest, verify) as prober,
        ):
            chunks = reader.chunks(ROWS_PER_WORKER * max(1, num_workers))
            summary = Summary(*_convert(chunks, partial(journal.complete, prober), accepted, rejected), rejected_path)
        if summary.rejected:
            put_in_place(rejected_draft, rejected_path)
        else:
            rejected_path.unlink(missing_ok=True)  # of an earlier run
        if summary.written:
            put_in_place(draft, output)
        journal.remove()  # not before: closing the drafts writes to them, and a disk may be full
    if summary.written == 0:
        raise TableError(f"no row of '{source}' can be used: {summary.describe_rejected()}; see {rejected_path}")
    return summary


def _convert(
    chunks: Iterable[Chunk], prober: FileProber, accepted: TableWriter, rejected: TableWriter
) -> tuple[int, Counter[str]]:
    """Probe all files and write chunk by chunk; the number of accepted rows, and of those rejected by reason."""
    count, reasons = 0, Counter()
    ahead, chunks = tee(chunks)  # files are read while a slow one of an earlier chunk is
    found = prober(path for rows, _ in ahead for path in rows["path"].to_pylist())
    for rows, malformed in chunks:
        results = list(islice(found, len(rows)))
        for place, reason in malformed.items():
            results[place] = reason
        usable = pa.array([isinstance(result, VideoFacts) for result in results], pa.bool_())
        facts = [result for result in results if isinstance(result, VideoFacts)]
        faults = [result for result in results if isinstance(result, str)]
        accepted.write(_with_facts(rows.filter(usable), facts))
        rejected.write(_with_reasons(rows.filter(pc.invert(usable)), faults))
        count += len(facts)
        reasons.update(fault.split(":")[0] for fault in faults)
    return count, reasons


def _with_facts(rows: pa.Table, facts: Sequence[VideoFacts]) -> pa.Table:
    columns = {
        "height": [fact.height for fact in facts],
        "width": [fact.width for fact in facts],
        "fps": [None if math.isnan(fact.fps) else round(fact.fps, 3) for fact in facts],
        "num_frames": [fact.num_frames for fact in facts],
        "aspect_ratio": [fact.height / fact.width for fact in facts],
        "resolution": [fact.height * fact.width for fact in facts],
    }
    for field in ADDED:
        rows = _set_column(rows, field, columns[field.name])
    return rows


def _with_reasons(rows: pa.Table, reasons: Sequence[str]) -> pa.Table:
    return _set_column(rows, pa.field("reason", pa.string()), reasons)


def _set_column(rows: pa.Table, field: pa.Field, values: Sequence) -> pa.Table:
    """In the place of the column of that name, or as the last one."""
    place, column = rows.schema.get_field_index(field.name), pa.array(values, field.type)
    return rows.append_column(field, column) if place < 0 else rows.set_column(place, field, column)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, from which a whole file is moved to `path`; what is left there is removed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
