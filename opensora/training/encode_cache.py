"""Fills a cache: ranks take parts of a table as they are done with others, and go on where an earlier run stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.common import get_logger
from opensora.data.bucket import BucketTable
from opensora.data.cache import ShardWriter, begin, complete, lock, stored_keys, text_key, without_entry
from opensora.data.cache_clips import ClipRequest, ClipSize, ClipsToCache, ClipWindows, clip_requests
from opensora.data.cache_index import Key, KeyIndex, KeySet, has_changed
from opensora.data.loader import VideoTextDataset, build_loader
from opensora.diffusion.conditions import spans_of
from opensora.parallel.context import ParallelContext
from opensora.parallel.work import SharedWork
from opensora.registry import DATASETS
from opensora.training.build import build_text_encoders, build_video_encoder
from opensora.training.cache_facts import TEXT, VIDEO, coverage, is_drawn, require_same, text_facts, video_facts
from opensora.training.encoders import TextEncoders, VideoEncoder

TEXTS_AT_ONCE = 32
SECONDS_BETWEEN_LINES = 30.0
# A part of the work is this share of a rank's, so that at the end none waits long for another; of at most so many rows.
PARTS_OF_A_RANK, ROWS_OF_A_PART = 200, 4096


class CacheRun:
    """Makes the caches that `cfg` (of `CacheSettings`) asks for; every rank runs it.

    What is encoded together does not depend on which rank does it, nor on how fast any is.
    """

    def __init__(self, cfg, context: ParallelContext):
        self.cfg, self.context, self.work = cfg, context, SharedWork(context)
        self.dataset: VideoTextDataset = DATASETS.build(cfg.dataset, where="dataset")
        self.windows = ClipWindows(self.dataset.table, self.dataset.fps_max, cfg.windows)
        self.buckets = BucketTable(cfg.bucket_config, self.dataset.fps_max, cfg.ae_spatial_compression)
        self.rows = self._rows_by_size()
        if not self.rows:
            raise ValueError(f"dataset.data_path='{cfg.dataset.data_path}': none of its rows is in a bucket")
        self.covers = coverage(cfg, self.dataset.table)
        self._locks = ExitStack()

    def run(self) -> None:
        with self._locks:
            if self.cfg.encode_video:
                self._cache_video(build_video_encoder(self.cfg, self.context.device))
            if self.cfg.encode_text:
                self._cache_text(build_text_encoders(self.cfg, self.context.device))

    @torch.no_grad()
    def _cache_video(self, encoder: VideoEncoder) -> None:
        config, causal = self.cfg.condition_config, encoder.autoencoder.is_causal
        spans = {size: spans_of(config, size[0], causal) for size in self.rows}
        description = {
            "made_with": video_facts(self.cfg, self.dataset.table) | {"windows": self.cfg.windows},
            "covers": self.covers,
            "posterior": encoder.posterior and list(encoder.posterior),
            "is_causal": causal,
        }
        needed = sum(
            self.windows.count_all(rows, size[0]) * encoder.entry_bytes(size, spans[size])
            for size, rows in self.rows.items()
        )
        folder = self._begin(VIDEO, description, needed)
        writer, rejected, remote = ShardWriter(folder), [], 0
        reader, requests = ClipsToCache(self.dataset), self._clip_requests(stored_keys(folder))
        for batch in build_loader(reader, requests, self.cfg.num_workers, self.cfg.prefetch_factor):
            rejected += batch.rejected
            if batch.video is not None:
                entries = encoder.entries(batch.video, spans[tuple(batch.video.shape[2:])])
                _write(writer, batch.keys, entries, batch.marks)
                remote += batch.marks.count(0)
        self._end(folder, writer, description, rejected)
        if remote := sum(self.context.gather_objects(remote)):
            get_logger().warning(
                f"{remote:,} clips are of URLs: that a video there was replaced is not noticed, so give a changed one "
                "another name"
            )

    def _cache_text(self, encoders: TextEncoders) -> None:
        description = {"made_with": text_facts(self.cfg), "covers": self.covers}
        rows = np.unique(np.concatenate(list(self.rows.values())))
        each = sum(tensor.nbytes for tensor in encoders.entries([""]).values())
        distinct = lambda: each * len({text_key(self.dataset.caption(row)) for row in rows.tolist()})  # noqa: E731
        folder = self._begin(TEXT, description, len(rows) * each, distinct)
        writer = ShardWriter(folder)
        for texts in self._new_texts(rows, stored_keys(folder)):
            _write(writer, [text_key(text) for text in texts], encoders.entries(texts), [0] * len(texts))
        self._end(folder, writer, description, [])

    def _rows_by_size(self) -> dict[ClipSize, NDArray[np.integer]]:
        """The rows that are trained in clips of each size; where buckets are drawn, in any of the epochs."""
        table, found = self.dataset.table, {}
        columns = (table.num_frames, table.height, table.width, table.fps)
        kind = np.int32 if len(table) < 2**31 else np.int64  # 4 bytes a row, with a hundred million of them
        for epoch in range(self.cfg.epochs if is_drawn(self.cfg.bucket_config) else 1):
            ids = self.buckets.assign(*columns, seed=self.cfg.seed, epoch=epoch).ids
            for number in np.unique(ids[ids >= 0]).tolist():
                bucket = self.buckets.buckets[number]
                size = (bucket.num_frames, bucket.height, bucket.width)
                rows = np.flatnonzero(ids == number).astype(kind)
                found[size] = np.union1d(found[size], rows) if size in found else rows
        return found

    def _clip_requests(self, stored: KeyIndex) -> Iterator[list[ClipRequest]]:
        """Those that this rank comes to do, in the batches that training has."""
        batch_sizes = {(b.num_frames, b.height, b.width): b.batch_size for b in self.buckets.buckets}
        table = self.dataset.table

        def is_done(row: int, key: Key) -> bool:
            mark = stored.mark(key)
            return mark is not None and not has_changed(table.path(row), mark)

        parts = [part for size in self.rows for part in self._cut(self.rows[size], batch_sizes[size], size)]
        parts.sort(key=lambda part: -prod(part.size))  # those that take long first: the end is then no long wait
        for part in self._take(parts, "clips"):
            yield from clip_requests(self.windows, part.size, part.rows, batch_sizes[part.size], is_done)

    def _new_texts(self, rows: NDArray[np.integer], stored: KeyIndex) -> Iterator[list[str]]:
        """Distinct captions that are not stored, of the `rows` that this rank comes to do, TEXTS_AT_ONCE at a time; and
        "". Two ranks may come to the same."""
        seen = KeySet()
        if self.context.is_main and text_key("") not in stored:
            yield [""]
        seen.add([text_key("")])
        for part in self._take(self._cut(rows, TEXTS_AT_ONCE), "captions"):
            texts = {text_key(text): text for text in map(self.dataset.caption, part.rows.tolist())}
            new = [key for key in texts if key not in seen and key not in stored]
            seen.add(new)
            for first in range(0, len(new), TEXTS_AT_ONCE):
                yield [texts[key] for key in new[first : first + TEXTS_AT_ONCE]]

    def _cut(self, rows: NDArray[np.integer], batch_size: int, size: ClipSize = (1, 1, 1)) -> list[_Part]:
        """Parts of whole batches, as far as the rows go."""
        wanted = min(ROWS_OF_A_PART, len(rows) // (PARTS_OF_A_RANK * self.context.world_size))
        step = max(1, wanted // batch_size) * batch_size
        return [_Part(size, rows[first : first + step]) for first in range(0, len(rows), step)]

    def _take(self, parts: Sequence[_Part], what: str) -> Iterator[_Part]:
        """The parts that this rank comes to do."""
        done = np.cumsum([0, *(prod(part.size) * len(part.rows) for part in parts)])
        rows = np.cumsum([0, *(len(part.rows) for part in parts)])
        progress = _Progress(int(rows[-1]), what)
        for number in self.work.numbers(len(parts)):
            progress.say(int(rows[number]), done[number] / done[-1])
            yield parts[number]

    def _begin(
        self, kind: str, description: dict[str, Any], needed: int, exactly: Callable[[], int] | None = None
    ) -> Path:
        """The folder of a cache, fit to be filled with `needed` bytes; made on rank 0."""
        folder = Path(self.cfg.output) / kind

        def prepare() -> None:
            self._locks.enter_context(lock(folder))
            old, new = begin(folder, description)["made_with"], description["made_with"]
            require_same(f"output='{self.cfg.output}': the cache there", old, new, "give another --output")
            _check_room(folder, needed, exactly)

        self.work.on_main(prepare)
        return folder

    def _end(self, folder: Path, writer: ShardWriter, description: dict[str, Any], rejected: list) -> None:
        """Write what is left; when all ranks have, rank 0 makes the index."""
        writer.flush()
        self.work.wait()
        rejected = [one for of_rank in self.context.gather_objects(rejected) for one in of_rank]

        def finish() -> tuple[int, int]:
            reasons = {key: {"path": path, "reason": reason} for key, path, reason in rejected}
            absent = without_entry(folder, {key: reasons[key]["path"] for key in reasons})
            (folder / "rejected.jsonl").write_text("".join(json.dumps(reasons[key]) + "\n" for key in absent))
            return complete(folder, description, absent), len(absent)

        entries, absent = self.work.on_main(finish)
        get_logger().info(f"{folder}: {entries:,} entries")
        if absent:
            get_logger().warning(f"{absent:,} clips could not be read, see {folder / 'rejected.jsonl'}")


def _write(writer: ShardWriter, keys: list[Key], entries: Mapping[str, Tensor], marks: list[int]) -> None:
    for place, (key, mark) in enumerate(zip(keys, marks, strict=True)):
        writer.add(key, {name: tensor[place] for name, tensor in entries.items()}, mark)


def _check_room(folder: Path, needed: int, exactly: Callable[[], int] | None) -> None:
    """Say how large the cache becomes; ValueError if the disk has no room for it.

    exactly: counts again what `needed` may have counted twice.
    """
    there = sum(file.stat().st_size for file in (folder / "shards").glob("*"))
    free = shutil.disk_usage(folder).free
    if exactly is not None and needed - there > free:
        needed = exactly()
    get_logger().info(f"{folder}: at most {_gib(needed)}, of which {_gib(there)} are there; {_gib(free)} are free")
    if needed - there > free:
        raise ValueError(
            f"output='{folder.parent}' has {_gib(free)} free, and {folder.name} needs {_gib(needed - there)} more: "
            f"choose a larger disk, or leave it out with --encode-{folder.name} False"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


class _Part(NamedTuple):
    """Rows that are encoded by one rank, in clips of one size."""

    size: ClipSize
    rows: NDArray[np.integer]


class _Progress:
    """A line in the log now and then; what was done by an earlier run counts at once."""

    def __init__(self, total: int, what: str):
        self._total, self._what = total, what
        self._begin = self._said = time.monotonic()

    def say(self, done: int, share: float) -> None:
        """done: rows that all ranks together have begun with, which are `share` of the work."""
        now = time.monotonic()
        if share and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._begin) * (1 / share - 1)
            get_logger().info(f"{self._what} of {done:,} of {self._total:,} rows, about {left / 60:.0f} min left")
