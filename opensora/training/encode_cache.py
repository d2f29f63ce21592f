"""Fills a cache: every rank encodes its share of a table, and goes on where an earlier run stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.common import get_logger
from opensora.data.bucket import BucketTable
from opensora.data.cache import Key, ShardWriter, StoredKeys, begin, complete, lock, text_key
from opensora.data.cache_clips import ClipRequest, ClipSize, ClipsToCache, ClipWindows, clip_requests
from opensora.data.loader import VideoTextDataset, build_loader
from opensora.diffusion.conditions import spans_of
from opensora.parallel.context import ParallelContext
from opensora.registry import DATASETS
from opensora.training.build import build_text_encoders, build_video_encoder
from opensora.training.cache_facts import TEXT, VIDEO, coverage, is_drawn, require_same, text_facts, video_facts
from opensora.training.encoders import TextEncoders, VideoEncoder

TEXTS_AT_ONCE = 32
SECONDS_BETWEEN_LINES = 30.0


class CacheRun:
    """Makes the caches that `cfg` (of `CacheSettings`) asks for; every rank runs it."""

    def __init__(self, cfg, context: ParallelContext):
        self.cfg, self.context = cfg, context
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
        clips = {size: self._count_windows(rows, size) for size, rows in self.rows.items()}
        needed = sum(count * encoder.entry_bytes(size, spans[size]) for size, count in clips.items())
        folder = self._begin(VIDEO, description, needed)
        stored, writer = StoredKeys(folder), ShardWriter(folder)
        progress, rejected = _Progress(sum(clips.values()) / self.context.world_size, "clips"), []
        reader = ClipsToCache(self.dataset)
        requests = self._clip_requests(stored)
        for batch in build_loader(reader, requests, self.cfg.num_workers, self.cfg.prefetch_factor):
            rejected += batch.rejected
            if batch.video is not None:
                _write(writer, batch.keys, encoder.entries(batch.video, spans[tuple(batch.video.shape[2:])]))
            progress.add(len(batch.keys) + len(batch.rejected))
        self._end(folder, writer, description, rejected)

    def _cache_text(self, encoders: TextEncoders) -> None:
        description = {"made_with": text_facts(self.cfg), "covers": self.covers}
        rows = np.unique(np.concatenate(list(self.rows.values())))
        each = sum(tensor.nbytes for tensor in encoders.entries([""]).values())
        distinct = lambda: each * len({text_key(self.dataset.caption(row)) for row in rows.tolist()})  # noqa: E731
        folder = self._begin(TEXT, description, len(rows) * each, distinct)
        stored, writer = StoredKeys(folder), ShardWriter(folder)
        mine = rows[self.context.rank :: self.context.world_size]
        for texts in self._new_texts(mine, stored):
            _write(writer, [text_key(text) for text in texts], encoders.entries(texts))
        self._end(folder, writer, description, [])

    def _rows_by_size(self) -> dict[ClipSize, NDArray[np.int64]]:
        """The rows that are trained in clips of each size; where buckets are drawn, in any of the epochs."""
        table, nobody = self.dataset.table, np.array([], dtype=np.int64)
        columns, found = (table.num_frames, table.height, table.width, table.fps), {}
        for epoch in range(self.cfg.epochs if is_drawn(self.cfg.bucket_config) else 1):
            ids = self.buckets.assign(*columns, seed=self.cfg.seed, epoch=epoch).ids
            for number in np.unique(ids[ids >= 0]).tolist():
                bucket = self.buckets.buckets[number]
                size = (bucket.num_frames, bucket.height, bucket.width)
                found[size] = np.union1d(found.get(size, nobody), np.flatnonzero(ids == number))
        return found

    def _count_windows(self, rows: NDArray[np.int64], size: ClipSize) -> int:
        return sum(self.windows.count(row, size[0]) for row in rows.tolist())

    def _clip_requests(self, stored: StoredKeys) -> Iterator[list[ClipRequest]]:
        """This rank's, in the batches that training has."""
        batch_sizes = {(b.num_frames, b.height, b.width): b.batch_size for b in self.buckets.buckets}
        for size, rows in self.rows.items():
            mine = rows[self.context.rank :: self.context.world_size]
            yield from clip_requests(self.windows, size, mine, batch_sizes[size], stored.__contains__)

    def _new_texts(self, rows: NDArray[np.int64], stored: StoredKeys) -> Iterator[list[str]]:
        """Distinct captions of `rows` that are not stored, and "", TEXTS_AT_ONCE at a time."""
        seen, batch, progress = {text_key("")}, [] if text_key("") in stored else [""], _Progress(len(rows), "captions")
        for row in rows.tolist():
            text = self.dataset.caption(row)
            key = text_key(text)
            if key not in seen and key not in stored:
                seen.add(key)
                batch.append(text)
            progress.add(1)
            if len(batch) == TEXTS_AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch

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

        self.context.on_main(prepare)
        return folder

    def _end(self, folder: Path, writer: ShardWriter, description: dict[str, Any], rejected: list) -> None:
        """Write what is left; when all ranks have, rank 0 makes the index."""
        writer.flush()
        rejected = [one for of_rank in self.context.gather_objects(rejected) for one in of_rank]

        def finish() -> int:
            lines = [json.dumps({"path": path, "reason": reason}) + "\n" for _, path, reason in rejected]
            (folder / "rejected.jsonl").write_text("".join(lines))
            return complete(folder, description, [key for key, _, _ in rejected])

        entries = self.context.on_main(finish)
        get_logger().info(f"{folder}: {entries:,} entries")
        if rejected:
            get_logger().warning(f"{len(rejected)} clips could not be read, see {folder / 'rejected.jsonl'}")


def _write(writer: ShardWriter, keys: list[Key], entries: Mapping[str, Tensor]) -> None:
    for place, key in enumerate(keys):
        writer.add(key, {name: tensor[place] for name, tensor in entries.items()})


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


class _Progress:
    """A line in the log now and then; what was done by an earlier run counts at once."""

    def __init__(self, total: float, what: str):
        self._total, self._what, self._done = total, what, 0
        self._begin = self._said = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._begin) * max(0.0, self._total / self._done - 1)
            get_logger().info(f"{self._done:,} of at most {self._total:,.0f} {self._what}, about {left / 60:.0f} min")
