"""A checkpoint on its way to the disk: written by a thread of each rank, published by rank 0 when all are done."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from opensora.checkpoint_folder import list_checkpoints, parse_folder_name
from opensora.checkpoint_manifest import (
    MANIFEST,
    FileRecord,
    checksum,
    format_manifest,
    size_problems,
    summary,
    weight_problems,
)
from opensora.common import get_logger
from opensora.durable import sync_folder, write_synced
from opensora.training.file_writer import Writer
from opensora.training.run_folder import REPLACED_PREFIX, TEMPORARY_PREFIX
from opensora.training.sharded_state import INDEX, Entry, format_index

# Network file systems show what other hosts wrote only after a while (NFS: up to acdirmax, 60 s).
VISIBLE_AFTER_S = 60.0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `latest` newest (None: all), and those of every `every`th update for ever."""

    latest: int | None = None
    every: int | None = None


class Files(NamedTuple):
    """What a rank writes of a checkpoint.

    Attributes:
        contents: bytes by name. entries: by folder, what its sharded tensors' index says of this rank.
    """

    contents: Mapping[str, memoryview]
    entries: Mapping[str, Sequence[Entry]]


class _Outcome(NamedTuple):
    """What a rank tells rank 0 of its files."""

    failure: str | None
    records: dict[str, FileRecord]
    entries: dict[str, Sequence[Entry]]


class Publisher:
    """Writes this rank's files, and on rank 0 makes what all have written a checkpoint.

    Args:
        group: of all ranks, for the thread that calls `write` alone.
        facts: for the manifest.
    """

    def __init__(self, group: dist.ProcessGroup, writer: Writer, retention: Retention, facts: Mapping[str, Any]):
        self._group, self._writer, self._retention, self._facts = group, writer, retention, facts
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._sent: dict[str, Sequence[Entry]] = {}
        self._entries: list[dict[str, Sequence[Entry]]] = [{} for _ in range(self._size)]
        self._indexes: dict[str, bytes] = {}

    def write(self, final: Path, files: Files | str) -> str | None:
        """Write a checkpoint; every rank calls it. `files` may be the reason why a rank has none.

        Returns:
            Why it failed, alike on all ranks; None if it is there.
        """
        temporary = temporary_folder(final)
        outcome = self._write_own(temporary, files)
        outcomes = [None] * self._size if self._rank == 0 else None
        dist.gather_object(outcome, outcomes, dst=0, group=self._group)
        failure = [self._finish(temporary, final, outcomes) if outcomes else None]
        dist.broadcast_object_list(failure, src=0, group=self._group)
        return failure[0]

    def close(self) -> None:
        dist.destroy_process_group(self._group)

    def _write_own(self, folder: Path, files: Files | str) -> _Outcome:
        if isinstance(files, str):
            return _Outcome(files, {}, {})
        news = {name: entries for name, entries in files.entries.items() if entries != self._sent.get(name)}
        self._sent |= news
        try:
            for name in files.contents:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            return _Outcome(None, self._writer(folder, files.contents), news)
        except Exception as error:  # whatever it is, all ranks are to know
            return _Outcome(f"rank {self._rank}: {error}", {}, news)

    def _finish(self, temporary: Path, final: Path, outcomes: Sequence[_Outcome]) -> str | None:
        failure = next((outcome.failure for outcome in outcomes if outcome.failure), None)
        try:
            self._take_entries(outcomes)
            if failure is None:
                _check_visible(temporary, [outcome.records for outcome in outcomes])
                records = {name: record for outcome in outcomes for name, record in outcome.records.items()}
                self._add_indexes(temporary, records)
                manifest = format_manifest(records, self._facts).encode()
                write_synced(temporary / MANIFEST, lambda file: file.write(manifest))
                publish(temporary, final)
        except Exception as error:
            failure = f"rank 0: {error}"
        if failure is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            self._prune(final)
        return failure

    def _prune(self, published: Path) -> None:
        try:
            prune(published.parent, self._retention, published)
        except Exception as error:  # the checkpoint is there all the same
            get_logger().warning(f"old checkpoints of {published.parent} could not be removed ({error})")

    def _take_entries(self, outcomes: Sequence[_Outcome]) -> None:
        """An index is made anew only when what some rank holds has changed: for many ranks it takes long."""
        for entries, outcome in zip(self._entries, outcomes, strict=True):
            entries |= outcome.entries
        for folder in {folder for outcome in outcomes for folder in outcome.entries}:
            self._indexes[folder] = format_index([entries.get(folder, ()) for entries in self._entries])

    def _add_indexes(self, folder: Path, records: dict[str, FileRecord]) -> None:
        for name, content in self._indexes.items():
            write_synced(folder / name / INDEX, lambda file, content=content: file.write(content))
            records[f"{name}/{INDEX}"] = FileRecord(len(content), (checksum(content),))


class BackgroundSave:
    """A save under way, in a thread of its own.

    Attributes:
        final: the checkpoint's folder. failure, seconds: why there is none, how long it took; known when `done`.
    """

    def __init__(self, publisher: Publisher, final: Path, files: Files | str):
        self.final, self.failure, self.seconds = final, None, 0.0
        self._arguments = (publisher, files)
        self._done = threading.Event()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()

    def _run(self) -> None:
        publisher, files = self._arguments
        began = time.perf_counter()
        try:
            self.failure = publisher.write(self.final, files)
        except Exception as error:  # another rank is gone
            self.failure = f"rank {dist.get_rank()}: {error}"
        finally:
            self._arguments, self.seconds = (), time.perf_counter() - began
            self._done.set()


def temporary_folder(final: Path) -> Path:
    """Where a checkpoint is written."""
    return final.with_name(TEMPORARY_PREFIX + final.name)


def _check_visible(folder: Path, records: Sequence[Mapping[str, FileRecord]]) -> None:
    """FileNotFoundError if this host does not see what every rank wrote."""
    until = time.monotonic() + VISIBLE_AFTER_S
    for rank, files in enumerate(records):
        while found := size_problems(folder, files):
            if time.monotonic() > until:
                raise FileNotFoundError(
                    f"rank {rank}'s files are not there ({summary(found)}): --outputs must be on storage that all "
                    "hosts share"
                )
            time.sleep(0.5)


def publish(temporary: Path, final: Path) -> None:
    """Give a written checkpoint its final name, on the disk before this returns."""
    for folder, _, _ in os.walk(temporary):
        sync_folder(Path(folder))
    if final.exists():  # the same step saved again, after a resume
        replaced = final.with_name(REPLACED_PREFIX + final.name)
        final.rename(replaced)
        temporary.rename(final)
        sync_folder(final.parent)
        _remove(replaced, final.name)
    else:
        temporary.rename(final)
        sync_folder(final.parent)


def _remove(folder: Path, name: str) -> None:
    """Remove a checkpoint, renamed first, so that none is ever half there; a failure is only said."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}old-{name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        get_logger().warning(f"{folder} could not be removed ({error})")


def prune(run_folder: Path, retention: Retention, published: Path | None = None) -> None:
    """Remove the checkpoints of a run that need not stay. That just published does.

    Those that lack something don't count as newest ones.
    """
    if not retention.latest:
        return
    checkpoints = list_checkpoints(run_folder)
    whole = [checkpoint for checkpoint in checkpoints if not weight_problems(checkpoint)]
    for old in checkpoints[: checkpoints.index(whole[-retention.latest :][0])] if whole else []:
        _, global_step = parse_folder_name(old)
        milestone = retention.every and global_step % retention.every == 0
        if not milestone and old != published:
            _remove(old, old.name)
