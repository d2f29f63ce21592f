"""The order of one epoch: which micro-batches exist, which of them make up an update, which rows they hold.

Pure functions of counts and keys. A *slot* is the place of one micro-batch; an update has `group` slots (data-parallel
size x accumulation steps), slot `micro_step * data_parallel_size + rank` of an update going to that rank.

Why updates are planned as they are: all ranks wait for the slowest, so the slots of an update should cost the same. So
micro-batches are sorted by cost and cut into updates, and the updates are shuffled. And as updates are planned for
`group` slots, one rank with two accumulation steps trains on exactly the updates of two ranks with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensora.data.bucket import Bucket
from opensora.data.random_draws import Purpose, hash_key

# Frames per token and text tokens of the model family that the project trains.
_TOKEN_FRAMES, _TEXT_TOKENS = 4, 512
# Tokens at which attention costs as much as the rest. Per token and block of width h with an MLP of 4 h, attention
# takes 4 * tokens * h floating-point operations and the linear layers 24 * h**2, in a double block (12 h**2 weights a
# stream) as in a single one: equal at 6 h, and h is 3072 in the 11B model.
_ATTENTION_TOKENS = 6 * 3072
_CHUNK_ROWS = 1 << 20


def video_tokens(bucket: Bucket, token_pixels: int = 16) -> int:
    """Tokens of one clip. `token_pixels`: pixels of a token's side, i.e. the autoencoder's compression times the
    patch."""
    frames = (bucket.num_frames - 1) // _TOKEN_FRAMES + 1
    return frames * (bucket.height // token_pixels) * (bucket.width // token_pixels)


def micro_batch_cost(bucket: Bucket, token_pixels: int = 16) -> int:
    """Relative cost of a micro-batch: batch * tokens * (1 + tokens / k), scaled to an integer.

    Tokens are those of the clip and its text. The frozen encoders are not counted.
    """
    tokens = _TEXT_TOKENS + video_tokens(bucket, token_pixels)
    return bucket.batch_size * tokens * (_ATTENTION_TOKENS + tokens)


def balance(costs: NDArray) -> float:
    """The share of all ranks' time that is work, when at each step all wait for the slowest.

    costs: [steps, ranks]. Returns mean cost / maximum over ranks, steps weighted by how long they take.
    """
    slowest = costs.max(axis=1).sum()
    return float(costs.mean(axis=1).sum() / slowest) if slowest else 1.0


@dataclass(frozen=True)
class BucketOrder:
    """The rows of every bucket in the order of an epoch. It depends on the seed, the epoch and which rows are in the
    bucket, never on batch sizes or the number of ranks.

    Attributes:
        rows: [N] row numbers, bucket after bucket; 32 bits where they suffice.
        starts: [num_buckets + 1] where in `rows` each bucket begins.
    """

    rows: NDArray[np.integer]
    starts: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each bucket: [num_buckets]."""
        return np.diff(self.starts)

    def slice(self, bucket: int, start: int, count: int) -> NDArray[np.integer]:
        first = self.starts[bucket] + start
        return self.rows[first : first + count]

    def members(self, bucket: int) -> NDArray[np.integer]:
        return self.rows[self.starts[bucket] : self.starts[bucket + 1]]


def order_rows(ids: NDArray[np.int16], num_buckets: int, seed: int, epoch: int) -> BucketOrder:
    """Shuffle the rows of each bucket. `ids`: [N] bucket of each row, -1 for none.

    Besides the result (4 bytes a row) it takes 16 bytes a row of the largest bucket.
    """
    rows, starts = _group_rows(ids, num_buckets)
    for first, end in pairwise(starts.tolist()):
        members = rows[first:end]
        keys = np.empty(len(members), dtype=np.uint64)
        for start in range(0, len(members), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            keys[part] = hash_key(Purpose.ROW_ORDER, seed, epoch, members[part])
        members[:] = members[np.argsort(keys)]
    return BucketOrder(rows, starts)


def _group_rows(ids: NDArray[np.int16], num_buckets: int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """(row numbers by bucket, where each bucket begins): a counting sort, in pieces to need little memory."""
    sizes = count_rows(ids, num_buckets)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.empty(starts[-1], dtype=np.int32 if len(ids) < 2**31 else np.int64)
    free = starts[:-1].copy()  # where each bucket's next row goes
    for start in range(0, len(ids), _CHUNK_ROWS):
        piece = ids[start : start + _CHUNK_ROWS]
        order = np.argsort(piece, kind="stable")
        order = order[np.count_nonzero(piece < 0) :]
        buckets = piece[order]
        counts = np.bincount(buckets, minlength=num_buckets)
        first = np.cumsum(counts) - counts
        rows[np.arange(len(order)) + (free - first)[buckets]] = start + order
        free += counts
    return rows, starts


def count_rows(ids: NDArray[np.int16], num_buckets: int) -> NDArray[np.int64]:
    """Rows of each bucket: [num_buckets]."""
    counts = np.zeros(num_buckets + 1, dtype=np.int64)
    for start in range(0, len(ids), _CHUNK_ROWS):
        counts += np.bincount(ids[start : start + _CHUNK_ROWS] + 1, minlength=num_buckets + 1)
    return counts[1:]


@dataclass(frozen=True)
class UpdatePlan:
    """The updates of an epoch, or of what is left of it.

    Attributes:
        bucket: [updates * group] bucket of each slot.
        start: [updates * group] where in its bucket's order the slot's micro-batch begins.
        group: slots per update.
        distinct: slots that hold a micro-batch of their own; the slots after that repeat the first ones.
        left_out: micro-batches that fill no update.
    """

    bucket: NDArray[np.int64]
    start: NDArray[np.int64]
    group: int
    distinct: int
    left_out: int

    @property
    def updates(self) -> int:
        return len(self.bucket) // self.group

    def consumed(self, updates: int, batch_sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of each bucket in the first `updates` updates: [num_buckets]."""
        slots = self.bucket[: min(updates * self.group, self.distinct)]
        return np.bincount(slots, minlength=len(batch_sizes)) * batch_sizes


def plan_updates(
    sizes: NDArray[np.int64],
    origin: NDArray[np.int64],
    batch_sizes: NDArray[np.int64],
    costs: Sequence[int],
    group: int,
    key: tuple[int, int],
) -> UpdatePlan:
    """Plan the updates of an epoch from where its buckets stand.

    Args:
        sizes, origin, batch_sizes: [num_buckets] rows, rows consumed already and rows per micro-batch.
        costs: of a micro-batch of each bucket.
        group: micro-batches per update.
        key: (seed, epoch) of the shuffles.

    Returns:
        The plan. Micro-batches of a bucket are handed out in the order of the plan, so what has been consumed is
        always the beginning of the bucket's order. Which micro-batches are left over, if they don't fill an update,
        is random. A whole epoch with fewer micro-batches than `group` is repeated to fill one update.
    """
    counts = micro_batch_counts(sizes, origin, batch_sizes)
    bucket = np.repeat(np.arange(len(counts)), counts)  # [total]
    total = len(bucket)
    bucket = bucket[np.argsort(hash_key(Purpose.MICRO_BATCH_ORDER, *key, np.arange(total)))]
    updates = num_updates(total, group, whole_epoch=not origin.any())
    bucket = bucket[: updates * group]
    distinct = len(bucket)
    if 0 < distinct < updates * group:
        bucket = np.resize(bucket, group)  # repeats cyclically
    else:
        by_cost = np.argsort(_ranks(costs)[bucket], kind="stable")
        shuffled = np.argsort(hash_key(Purpose.UPDATE_ORDER, *key, np.arange(updates)))
        bucket = bucket[by_cost].reshape(updates, group)[shuffled].reshape(-1)
    nth = _occurrence(bucket[:distinct])  # the how-manieth micro-batch of its bucket a slot holds
    start = (origin[bucket[:distinct]] + nth * batch_sizes[bucket[:distinct]]).astype(np.int64)
    return UpdatePlan(bucket, np.resize(start, len(bucket)), group, distinct, max(total - updates * group, 0))


class Leftovers(NamedTuple):
    """Samples that a plan does not reach: [num_buckets] each.

    Attributes:
        starved: all of buckets that have fewer than a micro-batch takes: they are left out in every epoch.
        incomplete: of the other buckets, too few for one more micro-batch.
        surplus: in whole micro-batches that fill no update.
    """

    starved: NDArray[np.int64]
    incomplete: NDArray[np.int64]
    surplus: NDArray[np.int64]

    @property
    def total(self) -> NDArray[np.int64]:
        return self.starved + self.incomplete + self.surplus


def left_over(plan: UpdatePlan, sizes: NDArray, origin: NDArray, batch_sizes: NDArray) -> Leftovers:
    """What of the rows from `origin` on is not in `plan`, which `plan_updates` made of the same arguments."""
    rest = np.maximum(sizes - origin, 0)
    incomplete = rest % batch_sizes
    surplus = rest - incomplete - plan.consumed(plan.updates, batch_sizes)
    starved = sizes < batch_sizes
    return Leftovers(np.where(starved, rest, 0), np.where(starved, 0, incomplete), surplus)


def micro_batch_counts(sizes: NDArray, origin: NDArray, batch_sizes: NDArray) -> NDArray[np.int64]:
    """Full micro-batches that are left in each bucket: [num_buckets]."""
    return np.maximum(sizes - origin, 0) // batch_sizes


def num_updates(micro_batches: int, group: int, whole_epoch: bool) -> int:
    """Updates that micro-batches make up: a whole epoch has at least one, if it has any micro-batch at all."""
    return max(micro_batches // group, int(whole_epoch and micro_batches > 0))


def _ranks(costs: Sequence[int]) -> NDArray[np.int64]:
    """Position of each cost among the distinct costs: equal costs keep equal ranks, so that they stay mixed."""
    return np.unique(np.asarray(costs), return_inverse=True)[1].reshape(-1)


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element, how many equal elements are before it: [2, 5, 2, 2] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    first = np.searchsorted(in_order, in_order, side="left")
    occurrence = np.empty(len(values), dtype=np.int64)
    occurrence[order] = np.arange(len(values)) - first
    return occurrence
