"""Which bucket, i.e. which clip size and batch size, each row of a table is trained in.

A bucket is (resolution, number of frames, aspect ratio). A row goes to the highest resolution that it nearly fills, the
longest clip that it is long enough for and the closest ratio, unless a probability in `bucket_config` sends it on
(spec 7; identical to Open-Sora 2.0, row by row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensora.data.aspect import closest_ratios, resolution_area, resolution_sizes
from opensora.data.frame_rate import sampling_intervals
from opensora.data.random_draws import RowStreams

# A row may be enlarged a little: it fits a resolution with at least this share of its pixels.
MIN_AREA_SHARE = 0.8
# Rows are assigned in pieces, which bounds memory and keeps a piece in the processor's cache.
CHUNK_ROWS = 1 << 17

# Why a row is in no bucket, and what the user can do about it.
REMEDIES = {
    "with an empty path or without a positive num_frames, height and width": "run scripts/cnv/meta.py on the table",
    "smaller than every resolution of bucket_config": "add a smaller resolution, e.g. '256px'",
    "images that have an fps above fps_max": "leave their fps empty: run scripts/cnv/meta.py on the table again",
    "images without an image bucket in their resolutions": "add num_frames 1 to bucket_config",
    "videos shorter than every clip of their resolutions": "add a smaller num_frames to bucket_config",
    "left out by the probabilities of bucket_config": "nothing to do if this is meant; another draw follows next epoch",
}
_UNUSABLE, _TOO_SMALL, _IMAGE_FPS, _NO_IMAGE_BUCKET, _TOO_SHORT, _NOT_DRAWN = range(len(REMEDIES))


class Bucket(NamedTuple):
    resolution: str
    num_frames: int
    ratio: str
    height: int
    width: int
    batch_size: int

    @property
    def key(self) -> str:
        """The bucket's name, e.g. "256px/33/16:9": it does not depend on the rest of the configuration."""
        return f"{self.resolution}/{self.num_frames}/{self.ratio}"

    @property
    def clip_key(self) -> str:
        """What the batch size belongs to, e.g. "256px/33"."""
        return f"{self.resolution}/{self.num_frames}"


class Assignment(NamedTuple):
    """Attributes:
    ids: [N] position in `BucketTable.buckets` of each row, -1 for rows in no bucket.
    dropped: number of rows in no bucket by reason, a key of `REMEDIES`; reasons without rows are absent.
    """

    ids: NDArray[np.int16]
    dropped: dict[str, int]


@dataclass(frozen=True)
class _ClipRule:
    """An entry of `bucket_config`: clips of `num_frames`, taken with probability `accept`. With probability `skip`
    the next shorter clip is tried first (negative: no such draw)."""

    num_frames: int
    accept: float
    skip: float
    batch_size: int


class _Resolution:
    """The rules of one resolution, longest clip first, and where its buckets begin."""

    def __init__(self, name: str, rules: list[_ClipRule], multiple: int, first_bucket: int):
        self.name = name
        self.min_area = resolution_area(name) * MIN_AREA_SHARE
        self.sizes = resolution_sizes(name, multiple)
        self.ratios = list(self.sizes)
        self.rules = rules
        self.first_bucket = first_bucket
        self.image_rule = next((i for i, rule in enumerate(rules) if rule.num_frames == 1), None)
        num_clips = len(rules) - (self.image_rule is not None)  # the image rule is the last
        self.lengths = np.array([rule.num_frames for rule in rules[:num_clips]], dtype=np.int64)
        self.accept = np.array([rule.accept for rule in rules])
        self.skip = np.array([rule.skip for rule in rules])

    def buckets(self) -> list[Bucket]:
        return [
            Bucket(self.name, rule.num_frames, ratio, *self.sizes[ratio], rule.batch_size)
            for rule in self.rules
            for ratio in self.ratios
        ]

    def longest_clip(self, num_frames: NDArray) -> NDArray[np.int64]:
        """Position of the longest clip rule that fits; `len(lengths)` where none does."""
        shorter = np.searchsorted(self.lengths[::-1], num_frames, side="right")  # how many rules fit
        return len(self.lengths) - shorter


class BucketTable:
    """The buckets of a configuration.

    Args:
        bucket_config: {resolution: {num_frames: (probability, batch size)}}. The probability is that of a row to stay
            at this resolution; as a pair (p, q) the row goes on to the next shorter clip with probability q first.
        fps_max: videos are thinned to at most this rate before their frames are counted; None: never.
        multiple: of heights and widths, e.g. 16 for an autoencoder's 8 and a patch of 2.

    Raises:
        ValueError: for an entry that cannot be used.
    """

    def __init__(self, bucket_config: Mapping[str, Mapping], fps_max: float | None = None, multiple: int = 16):
        if fps_max is not None and not fps_max > 0:
            raise ValueError(f"dataset.fps_max={fps_max} must be positive, or None for no limit")
        if not bucket_config:
            raise ValueError("bucket_config is empty: give e.g. {'256px': {1: (1.0, 45), 33: (1.0, 12)}}")
        self.fps_max = fps_max
        self.multiple = multiple
        self.buckets: list[Bucket] = []
        self._resolutions: list[_Resolution] = []
        for name in sorted(bucket_config, key=resolution_area, reverse=True):
            rules = _read_rules(name, bucket_config[name])
            resolution = _Resolution(name, rules, multiple, first_bucket=len(self.buckets))
            self._resolutions.append(resolution)
            self.buckets += resolution.buckets()
        assert len(self.buckets) < np.iinfo(np.int16).max

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def is_random(self) -> bool:
        """Whether another seed or epoch can give another assignment."""
        rules = [rule for resolution in self._resolutions for rule in resolution.rules]
        return any(rule.accept < 1 or 0 <= rule.skip < 1 for rule in rules)

    @property
    def fingerprint(self) -> str:
        """A hash of all that an assignment depends on; batch sizes are not part of it."""
        facts: list[Any] = [self.fps_max, self.multiple]
        for resolution in self._resolutions:
            rules = [(rule.num_frames, rule.accept, rule.skip) for rule in resolution.rules]
            facts.append([resolution.name, resolution.sizes, rules])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def assign(
        self, num_frames: NDArray, height: NDArray, width: NDArray, fps: NDArray, seed: int = 0, epoch: int = 0
    ) -> Assignment:
        """The bucket of each row.

        Args:
            num_frames, height, width: [N] integers; a value below 1 marks an unusable row.
            fps: [N] floats, NaN where unknown (images).
            seed, epoch: row i draws from `numpy.random.default_rng(seed + epoch + i * len(buckets))`.
        """
        rows = np.arange(len(num_frames), dtype=np.uint64)
        seeds = rows * np.uint64(len(self.buckets)) + np.uint64(seed + epoch)
        return self.assign_seeded(num_frames, height, width, fps, seeds)

    def assign_seeded(
        self, num_frames: NDArray, height: NDArray, width: NDArray, fps: NDArray, seeds: NDArray[np.uint64]
    ) -> Assignment:
        """The bucket of each row, given the seed of each row's generator."""
        ids = np.empty(len(num_frames), dtype=np.int16)
        dropped = np.zeros(len(REMEDIES), dtype=np.int64)
        for start in range(0, len(ids), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            columns = (num_frames[part], height[part], width[part], fps[part])
            ids[part], reasons = self._assign_chunk(*columns, RowStreams(seeds[part]))
            dropped += np.bincount(reasons, minlength=len(REMEDIES))
        return Assignment(ids, {reason: int(n) for reason, n in zip(REMEDIES, dropped, strict=True) if n})

    def _assign_chunk(
        self, num_frames: NDArray, height: NDArray, width: NDArray, fps: NDArray, streams: RowStreams
    ) -> tuple[NDArray, NDArray]:
        """(ids [N], reasons of the rows without a bucket)."""
        ids = np.full(len(num_frames), -1, dtype=np.int16)
        usable = (num_frames > 0) & (height > 0) & (width > 0)
        area = height.astype(np.int64) * width
        frames = num_frames // sampling_intervals(fps, self.fps_max)
        fits_size = np.zeros(len(ids), dtype=bool)
        fits_length = np.zeros(len(ids), dtype=bool)
        for resolution in self._resolutions:
            rows = np.flatnonzero(usable & (ids < 0) & (area >= resolution.min_area))
            fits_size[rows] = True
            rule = np.full(len(rows), -1)  # the rule that takes the row; -1: none
            image, video = frames[rows] == 1, frames[rows] > 1
            if resolution.image_rule is not None:
                fits_length[rows[image]] = True
                taken = _draw(resolution.accept[[resolution.image_rule]].repeat(image.sum()), rows[image], streams)
                rule[image] = np.where(taken, resolution.image_rule, -1)
            fits_length[rows[video]] |= resolution.longest_clip(frames[rows[video]]) < len(resolution.lengths)
            rule[video] = _draw_clips(resolution, frames[rows[video]], rows[video], streams)
            rows, rule = rows[rule >= 0], rule[rule >= 0]
            if len(rows):
                ratio = closest_ratios(height[rows], width[rows], resolution.ratios)
                ids[rows] = resolution.first_bucket + rule * len(resolution.ratios) + ratio
        reasons = np.full(len(ids), _NOT_DRAWN)
        reasons[~fits_length] = _TOO_SHORT
        reasons[~fits_length & (frames == 1)] = _NO_IMAGE_BUCKET
        reasons[~fits_length & (frames < 1) & (num_frames == 1)] = _IMAGE_FPS
        reasons[~fits_size] = _TOO_SMALL
        reasons[~usable] = _UNUSABLE
        return ids, reasons[ids < 0]


def _draw(probability: NDArray, rows: NDArray, streams: RowStreams) -> NDArray[np.bool_]:
    """Whether each row's draw falls within its probability. A certain outcome takes no number from the row's stream.

    (Open-Sora draws for certain images too, but such a row's stream is never used again, and compares images with `<`:
    equality has a probability of 2**-53.)
    """
    hit = probability >= 1
    uncertain = np.flatnonzero(~hit & (probability >= 0))
    hit[uncertain] = streams.random(rows[uncertain]) <= probability[uncertain]
    return hit


def _draw_clips(resolution: _Resolution, frames: NDArray, rows: NDArray, streams: RowStreams) -> NDArray[np.int64]:
    """The clip rule that takes each video, -1 where the resolution does not take it."""
    rule = resolution.longest_clip(frames)
    taken = np.full(len(rows), -1)
    pending = np.flatnonzero(rule < len(resolution.lengths))
    while len(pending):
        shorter = _draw(resolution.skip[rule[pending]], rows[pending], streams)
        stays = pending[~shorter]
        accepted = stays[_draw(resolution.accept[rule[stays]], rows[stays], streams)]
        taken[accepted] = rule[accepted]
        pending = pending[shorter]
        rule[pending] += 1
        pending = pending[rule[pending] < len(resolution.lengths)]
    return taken


def _read_rules(resolution: str, config: Mapping) -> list[_ClipRule]:
    """The entries of one resolution, longest clip first."""
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"bucket_config['{resolution}'] must be {{num_frames: (probability, batch size)}}: {config!r}")
    rules = [_read_rule(f"bucket_config['{resolution}'][{key}]", key, entry) for key, entry in config.items()]
    if len({rule.num_frames for rule in rules}) < len(rules):
        raise ValueError(f"bucket_config['{resolution}'] has a num_frames twice: {', '.join(map(repr, config))}")
    return sorted(rules, key=lambda rule: rule.num_frames, reverse=True)


def _read_rule(where: str, key: Any, entry: Any) -> _ClipRule:
    if not str(key).isdecimal() or int(key) < 1:
        raise ValueError(f"{where}: the number of frames must be a positive integer")
    try:
        probability, batch_size = entry
        pair = isinstance(probability, (tuple, list))
        accept, skip = probability if pair else (probability, -1.0)
        accept, skip = float(accept), float(skip)
    except (TypeError, ValueError):
        raise ValueError(f"{where}={entry!r} must be (probability, batch size)") from None
    if not 0 <= accept <= 1 or (pair and not 0 <= skip <= 1):
        raise ValueError(f"{where}={entry!r}: a probability must be within 0 and 1")
    if pair and int(key) == 1:
        raise ValueError(f"{where}={entry!r}: images have one probability, there is no shorter clip to go on to")
    if batch_size is None and accept == 0:
        batch_size = 1  # a bucket that takes nothing
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{where}={entry!r}: the batch size must be a positive integer")
    return _ClipRule(int(key), accept, skip, batch_size)
