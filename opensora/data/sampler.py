"""Which samples each micro-batch holds, for every rank, epoch after epoch, and where to go on after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensora.common import get_logger, rank
from opensora.data.bucket import REMEDIES, Assignment, Bucket, BucketTable
from opensora.data.plan import (
    BucketOrder,
    Leftovers,
    UpdatePlan,
    count_rows,
    left_over,
    micro_batch_cost,
    micro_batch_counts,
    num_updates,
    order_rows,
    plan_updates,
)
from opensora.data.random_draws import Purpose, hash_key
from opensora.data.records import Table

NUM_SUBSTITUTES = 8
# Names in a warning, before "and N more".
_LISTED = 8


class SampleRequest(NamedTuple):
    """One sample of a micro-batch.

    Attributes:
        index: row of the table.
        num_frames, height, width: of the clip, in frames and pixels.
        epoch: the epoch it is drawn in.
        substitutes: other rows of its bucket, in the order in which to try them if this one cannot be read.
        seed: 63 bits keyed by (seed, epoch, index), from which all that is random about the sample follows.
        update, micro_step: where in the epoch's plan its micro-batch is.
    """

    index: int
    num_frames: int
    height: int
    width: int
    epoch: int
    substitutes: tuple[int, ...]
    seed: int
    update: int
    micro_step: int


class BucketSampler:
    """Micro-batches of one data-parallel rank: an endless batch sampler over the epochs that are left.

    Iterating yields one list of `SampleRequest` per micro-step, `accumulation_steps` of them per update, and goes over
    into the next epoch without a stop; it ends after the last epoch. What has been trained on is known to the trainer,
    not to the sampler (workers read ahead), so `state_dict` is told: the epoch and the updates done in it.

    Args:
        table: the samples.
        buckets: where they belong.
        seed: of every order.
        epochs: the epoch to stop before.
        data_parallel_size, data_parallel_rank: ranks that train on different samples, and which of them this is.
        accumulation_steps: micro-batches of a rank per update.

    Raises:
        ValueError: if not a single micro-batch can be formed.
    """

    def __init__(
        self,
        table: Table,
        buckets: BucketTable,
        *,
        seed: int = 0,
        epochs: int = 1,
        data_parallel_size: int = 1,
        data_parallel_rank: int = 0,
        accumulation_steps: int = 1,
    ):
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        assert 0 <= data_parallel_rank < data_parallel_size and accumulation_steps >= 1
        self.table, self.buckets = table, buckets
        self.seed, self.epochs = seed, epochs
        self.data_parallel_size, self.data_parallel_rank = data_parallel_size, data_parallel_rank
        self.accumulation_steps = accumulation_steps
        self.group = data_parallel_size * accumulation_steps
        self._batch_sizes = np.array([bucket.batch_size for bucket in buckets.buckets], dtype=np.int64)
        self._assigned: tuple[int, Assignment] | None = None
        self._origin, self._origin_epoch = self._nothing(), 0
        self._epoch, self._updates = 0, 0
        self._report_shortages()

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, updates done in it) where iterating starts."""
        return self._epoch, self._updates

    def start_at(self, epoch: int, micro_steps: int = 0) -> None:
        """Start after `micro_steps` micro-batches (of each rank) of an epoch; more than it has reach into the next."""
        updates, rest = divmod(micro_steps, self.accumulation_steps)
        if rest:
            get_logger().warning(
                "start_step=%d is within an update of %d micro-batches: starting at %d",
                *(micro_steps, self.accumulation_steps, micro_steps - rest),
            )
        self._seek(epoch, updates, self._nothing())

    def len_epoch(self, epoch: int) -> int:
        """Updates in the epoch's plan; for the epoch that was resumed in another layout, in the plan of the rest."""
        origin = self._origin_of(epoch)
        counts = micro_batch_counts(self.sizes(epoch), origin, self._batch_sizes)
        return num_updates(int(counts.sum()), self.group, whole_epoch=not origin.any())

    def state_dict(self, epoch: int, updates: int) -> dict[str, Any]:
        """What a resume needs (plain values for JSON), given the updates of `epoch` that have been trained on."""
        origin = self._origin_of(epoch)
        names = [bucket.key for bucket in self.buckets.buckets]
        return {
            "seed": self.seed,
            "epoch": epoch,
            "updates": updates,
            "fingerprint": self._fingerprint(),
            "group": self.group,
            "batch_sizes": {bucket.clip_key: bucket.batch_size for bucket in self.buckets.buckets},
            "origin": {name: int(n) for name, n in zip(names, origin, strict=True) if n},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. With another number of ranks, accumulation or other batch sizes, exactly the
        samples of the epoch that have not been seen follow, in a new plan."""
        epoch, updates = state["epoch"], state["updates"]
        if state["fingerprint"] != self._fingerprint():
            _warn("the table or bucket_config is not the checkpoint's: epoch %d starts anew", epoch)
            self._seek(epoch, 0, self._nothing())
            return
        if state["seed"] != self.seed:
            _warn("the checkpoint's order of samples is kept: seed=%d instead of %d", state["seed"], self.seed)
            self.seed = state["seed"]
            self._assigned = None
        origin = np.array([state["origin"].get(bucket.key, 0) for bucket in self.buckets.buckets], dtype=np.int64)
        batch_sizes = np.array([state["batch_sizes"][bucket.clip_key] for bucket in self.buckets.buckets])
        if state["group"] != self.group or not np.array_equal(batch_sizes, self._batch_sizes):
            done = self._plan(epoch, origin, batch_sizes, state["group"]).consumed(updates, batch_sizes)
            origin, updates = origin + done, 0
            left = int(self.sizes(epoch).sum() - origin.sum())
            get_logger().info("epoch %d goes on in a new layout with the %d samples not yet seen", epoch, left)
        self._seek(epoch, updates, origin)

    def plan(self, epoch: int) -> UpdatePlan:
        """The updates of an epoch, from its origin on."""
        return self._plan(epoch, self._origin_of(epoch), self._batch_sizes, self.group)

    def left_over(self, epoch: int, plan: UpdatePlan) -> Leftovers:
        """What the epoch's plan leaves out of each bucket. Which samples these are changes from epoch to epoch."""
        return left_over(plan, self.sizes(epoch), self._origin_of(epoch), self._batch_sizes)

    def sizes(self, epoch: int) -> NDArray[np.int64]:
        """Rows of each bucket in an epoch: [num_buckets]."""
        return count_rows(self._assign(epoch).ids, len(self.buckets))

    def bucket_of(self, row: int, epoch: int) -> Bucket:
        """The bucket that a row which is trained on belongs to in an epoch."""
        return self.buckets.buckets[int(self._assign(epoch).ids[row])]

    def dropped(self, epoch: int) -> dict[str, int]:
        """Rows that are in no bucket in an epoch, by reason (a key of `bucket.REMEDIES`)."""
        return self._assign(epoch).dropped

    def costs(self) -> NDArray[np.int64]:
        """Relative cost of a micro-batch of each bucket: [num_buckets]."""
        return np.array(self._costs(self._batch_sizes))

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        start = self._updates
        for epoch in range(self._epoch, self.epochs):
            plan = self.plan(epoch)
            if epoch == self._epoch:
                self._report_plan(epoch, plan)
            order = order_rows(self._assign(epoch).ids, len(self.buckets), self.seed, epoch)
            for update in range(start, plan.updates):
                for micro_step in range(self.accumulation_steps):
                    slot = update * self.group + micro_step * self.data_parallel_size + self.data_parallel_rank
                    bucket, first = int(plan.bucket[slot]), int(plan.start[slot])
                    yield self._requests(order, bucket, first, epoch, update, micro_step)
            start = 0

    def _requests(
        self, order: BucketOrder, bucket: int, first: int, epoch: int, update: int, micro_step: int
    ) -> list[SampleRequest]:
        _, num_frames, _, height, width, batch_size = self.buckets.buckets[bucket]
        rows = order.slice(bucket, first, batch_size)
        seeds = hash_key(Purpose.SAMPLE, self.seed, epoch, rows) >> np.uint64(1)
        substitutes = self._substitutes(order.members(bucket), np.arange(first, first + batch_size), epoch)
        return [
            SampleRequest(row, num_frames, height, width, epoch, others, seed, update, micro_step)
            for row, others, seed in zip(rows.tolist(), substitutes, seeds.tolist(), strict=True)
        ]

    def _substitutes(self, members: NDArray, positions: NDArray, epoch: int) -> list[tuple[int, ...]]:
        """For the samples at `positions` of a bucket's order, other members of the bucket."""
        others = len(members) - 1
        if others <= NUM_SUBSTITUTES:
            steps = np.arange(1, others + 1)
        else:
            nth = np.arange(NUM_SUBSTITUTES)
            draws = hash_key(Purpose.SUBSTITUTES, self.seed, epoch, members[positions, None], nth)
            steps = 1 + (draws % np.uint64(others)).astype(np.int64)  # [B, NUM_SUBSTITUTES], never a whole round
        rows = members[(positions[:, None] + steps) % len(members)]
        return [tuple(dict.fromkeys(row)) for row in rows.tolist()]

    def _plan(self, epoch: int, origin: NDArray, batch_sizes: NDArray, group: int) -> UpdatePlan:
        return plan_updates(self.sizes(epoch), origin, batch_sizes, self._costs(batch_sizes), group, (self.seed, epoch))

    def _costs(self, batch_sizes: NDArray) -> list[int]:
        buckets = zip(self.buckets.buckets, batch_sizes.tolist(), strict=True)
        return [micro_batch_cost(bucket._replace(batch_size=n), self.buckets.multiple) for bucket, n in buckets]

    def _assign(self, epoch: int) -> Assignment:
        """The bucket of each row in an epoch; the last answer is kept, for all epochs if nothing is drawn."""
        key = epoch if self.buckets.is_random else 0
        assigned = self._assigned  # the loader asks in a thread of its own
        if assigned is None or assigned[0] != key:
            columns = (self.table.num_frames, self.table.height, self.table.width, self.table.fps)
            assigned = self._assigned = (key, self.buckets.assign(*columns, seed=self.seed, epoch=epoch))
        return assigned[1]

    def _nothing(self) -> NDArray[np.int64]:
        return np.zeros(len(self.buckets), dtype=np.int64)

    def _origin_of(self, epoch: int) -> NDArray[np.int64]:
        return self._origin if epoch == self._origin_epoch else self._nothing()

    def _seek(self, epoch: int, updates: int, origin: NDArray[np.int64]) -> None:
        self._origin, self._origin_epoch = origin, epoch
        while epoch < self.epochs and updates >= self.len_epoch(epoch):
            updates -= self.len_epoch(epoch)
            epoch += 1
        self._epoch, self._updates = epoch, updates

    def _fingerprint(self) -> str:
        return f"{self.table.fingerprint}-{self.buckets.fingerprint}"

    def _report_plan(self, epoch: int, plan: UpdatePlan) -> None:
        if 0 < plan.distinct < self.group:
            _warn(
                "an epoch has %d micro-batches where an update takes %d: they are repeated to fill one update "
                "(use fewer ranks or accumulation steps, smaller batch sizes or more samples)",
                *(plan.distinct, self.group),
            )
        rest = self.left_over(epoch, plan)
        incomplete, surplus = rest.incomplete.sum(), rest.surplus.sum()
        get_logger().info(
            f"epoch {epoch}: {plan.updates} updates of {self.group} micro-batches; {incomplete + surplus} samples are "
            "left over"
            + (
                f" ({incomplete} are too few for a micro-batch, {surplus} are in {plan.left_out} micro-batches too few "
                "for an update), others each epoch"
                if incomplete + surplus
                else ""
            )
        )

    def _report_shortages(self) -> None:
        """Say which rows and buckets the first epoch does not train on, and why; ValueError if that is all of them."""
        dropped, sizes = self.dropped(0), self.sizes(0)
        reasons = [f"{n} {reason} ({REMEDIES[reason]})" for reason, n in dropped.items()]
        starved = [
            f"{bucket.key} ({size} of {bucket.batch_size})"
            for bucket, size in zip(self.buckets.buckets, sizes.tolist(), strict=True)
            if 0 < size < bucket.batch_size
        ]
        if not (sizes >= self._batch_sizes).any():
            if starved:
                reasons.append(f"{len(starved)} buckets have fewer samples than their batch size: {_list(starved)}")
            raise ValueError(
                f"no batch can be formed from the {len(self.table)} rows of '{self.table.file}': {'; '.join(reasons)}. "
                "Add samples, or change bucket_config (smaller batch sizes, sizes or lengths)"
            )
        if reasons:
            _warn("%d of %d rows are not used: %s", sum(dropped.values()), len(self.table), "; ".join(reasons))
        if starved:
            _warn(
                "%d buckets have fewer samples than their batch size and are not used, %d samples in all "
                "(reduce the batch size): %s",
                *(len(starved), sizes[sizes < self._batch_sizes].sum(), _list(starved)),
            )
        filled = {bucket.clip_key for bucket, size in zip(self.buckets.buckets, sizes, strict=True) if size}
        empty = [key for key in dict.fromkeys(bucket.clip_key for bucket in self.buckets.buckets) if key not in filled]
        if empty:
            _warn("no sample is in %d entries of bucket_config (remove them): %s", len(empty), _list(empty))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _warn(message: str, *arguments: Any) -> None:
    """A warning that concerns all ranks, given once."""
    if rank() == 0:
        get_logger().warning(message, *arguments)
