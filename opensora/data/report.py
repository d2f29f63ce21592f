"""What an epoch trains on, by bucket: samples, micro-batches, steps, frames, tokens, and what is left out and why."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from opensora.data.bucket import REMEDIES, Bucket
from opensora.data.plan import balance, video_tokens
from opensora.data.sampler import BucketSampler


@dataclass(frozen=True)
class BucketCount:
    """An epoch's share of one bucket, or of several.

    Attributes:
        key: the bucket's name, or that of the clip that several buckets share, e.g. "256px/33".
        num_frames, batch_size: of the bucket.
        samples: rows of the table in it.
        micro_batches: that are trained on.
        seen: samples in these.
        frames, tokens: in the samples that are seen; tokens of the video, without text.
        cost: of the micro-batches, relative to other buckets.
        starved, incomplete, surplus: samples left out, see `plan.Leftovers`.
    """

    key: str
    num_frames: int
    batch_size: int
    samples: int
    micro_batches: int
    seen: int
    frames: int
    tokens: int
    cost: int
    starved: int
    incomplete: int
    surplus: int

    @property
    def left_over(self) -> int:
        return self.samples - self.seen

    def __add__(self, other: BucketCount) -> BucketCount:
        summed = ("samples", "micro_batches", "seen", "frames", "tokens", "cost", "starved", "incomplete", "surplus")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in summed})


@dataclass(frozen=True)
class EpochReport:
    """An epoch of training.

    Attributes:
        counts: of each bucket that has rows, highest resolution and longest clips first.
        rows: of the table.
        dropped: rows in no bucket, by reason (a key of `bucket.REMEDIES`).
        ranks, accumulation_steps: data-parallel ranks, and micro-batches of each in an update.
        updates: of the epoch.
        balance: mean over maximum of the ranks' work in a step, over the epoch: the share of time not spent waiting.
    """

    counts: list[BucketCount]
    rows: int
    dropped: dict[str, int]
    ranks: int
    accumulation_steps: int
    updates: int
    balance: float

    def total(self, kind: str = "") -> BucketCount:
        """The sum of all counts, of those of "images" or of "videos"."""
        wanted = {"images": lambda n: n == 1, "videos": lambda n: n > 1}.get(kind, lambda n: True)
        return _sum(kind or "all", [count for count in self.counts if wanted(count.num_frames)])

    def by_clip(self) -> list[BucketCount]:
        """Counts summed over aspect ratios."""
        groups = groupby(self.counts, key=lambda count: count.key.rpartition("/")[0])
        return [_sum(key, list(counts)) for key, counts in groups]

    def steps(self, count: BucketCount) -> float:
        """The updates that a count's micro-batches make up."""
        return count.micro_batches / (self.ranks * self.accumulation_steps)


def _sum(key: str, counts: Iterable[BucketCount]) -> BucketCount:
    total = BucketCount(key, *[0] * 11)
    for i, count in enumerate(counts):
        total = (total if i else replace(total, num_frames=count.num_frames, batch_size=count.batch_size)) + count
    return total


def epoch_report(sampler: BucketSampler, epoch: int = 0) -> EpochReport:
    """What `sampler` will go through in an epoch."""
    plan = sampler.plan(epoch)
    sizes, rest, costs = sampler.sizes(epoch), sampler.left_over(epoch, plan), sampler.costs()
    planned = np.bincount(plan.bucket[: plan.distinct], minlength=len(sizes))
    counts = []
    for i, bucket in enumerate(sampler.buckets.buckets):
        if sizes[i]:
            left_out = (int(kind[i]) for kind in rest)
            counts.append(
                _count(bucket, sampler.buckets.multiple, int(sizes[i]), int(planned[i]), int(costs[i]), *left_out)
            )
    return EpochReport(
        counts,
        rows=len(sampler.table),
        dropped=sampler.dropped(epoch),
        ranks=sampler.data_parallel_size,
        accumulation_steps=sampler.accumulation_steps,
        updates=plan.updates,
        balance=balance(costs[plan.bucket].reshape(-1, sampler.data_parallel_size)),
    )


def _count(
    bucket: Bucket, token_pixels: int, samples: int, micro_batches: int, cost: int, *left_out: int
) -> BucketCount:
    seen = micro_batches * bucket.batch_size
    frames, tokens = seen * bucket.num_frames, seen * video_tokens(bucket, token_pixels)
    fixed = (bucket.key, bucket.num_frames, bucket.batch_size)
    return BucketCount(*fixed, samples, micro_batches, seen, frames, tokens, micro_batches * cost, *left_out)


# ----------------------------------------------------------------------------------------------------- as text

_COLUMNS = ("bucket", "batch size", "samples", "batches", "steps", "frames", "tokens", "cost", "left over")


def render(report: EpochReport) -> str:
    """The report for a terminal: a line per clip size and length, the sum, and what is left out and why."""
    everything = report.total()
    lines = [_COLUMNS, *(_cells(report, count) for count in [*report.by_clip(), everything])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [" ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    rule = "-" * len(table[0])
    return "\n".join([table[0], rule, *table[1:-1], rule, table[-1], "", *_facts(report, everything)])


def _cells(report: EpochReport, count: BucketCount) -> tuple[str, ...]:
    share = count.cost / max(report.total().cost, 1)
    return (
        count.key,
        "" if count.key == "all" else str(count.batch_size),
        f"{count.samples:,}",
        f"{count.micro_batches:,}",
        f"{report.steps(count):,.1f}",
        f"{count.frames:,}",
        human(count.tokens),
        f"{share:.1%}",
        f"{count.left_over:,}" if count.left_over else "",
    )


def _facts(report: EpochReport, everything: BucketCount) -> list[str]:
    images, videos = report.total("images"), report.total("videos")
    image_share, video_share = (kind.tokens / max(everything.tokens, 1) for kind in (images, videos))
    return [
        f"an epoch: {report.updates:,} updates of {report.ranks} data-parallel ranks x {report.accumulation_steps} "
        f"micro-batches, {everything.seen:,} of the table's {report.rows:,} rows",
        f"balance: {report.balance:.4f} (mean over maximum of the ranks' work in a step)",
        f"images : videos: {images.seen:,} : {videos.seen:,} samples, {image_share:.1%} : {video_share:.1%} of the "
        "tokens",
        f"left over in this epoch, others in the next: {everything.incomplete:,} too few for a batch, "
        f"{everything.surplus:,} in batches too few for an update",
        *_left_out(report, everything.starved),
    ]


def _left_out(report: EpochReport, starved: int) -> list[str]:
    lines = [f"  {count:,} {reason}: {REMEDIES[reason]}" for reason, count in report.dropped.items()]
    if starved:
        lines.append(f"  {starved:,} in buckets with fewer rows than their batch size: reduce the batch size")
    return [f"rows without a batch: {sum(report.dropped.values()) + starved:,}", *lines]


def human(number: float) -> str:
    """A count with three digits and a unit: 12345 -> "12.3k"."""
    if number < 1000:
        return f"{number:.0f}"
    power = min(int(f"{number:.2e}".partition("e")[2]), 17)  # after rounding to three digits
    return f"{number / 1000 ** (power // 3):.{2 - power % 3}f}{'kMGTP'[power // 3 - 1]}"


def write_csv(report: EpochReport, path: Path) -> None:
    """Every bucket with its exact numbers."""
    names = ("key", "batch_size", "samples", "micro_batches", "seen", "frames", "tokens")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "steps", "cost_share", "starved", "incomplete", "surplus"])
        cost = max(report.total().cost, 1)
        for count in report.counts:
            shares = (round(report.steps(count), 4), f"{count.cost / cost:.6f}")
            left_out = (count.starved, count.incomplete, count.surplus)
            writer.writerow([*(getattr(count, name) for name in names), *shares, *left_out])
