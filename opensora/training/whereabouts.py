"""Where a rank is in its run, in words that lead to the cause when it does not get on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from opensora.data.batch import Batch
from opensora.data.bucket import Bucket
from opensora.data.sampler import BucketSampler
from opensora.parallel.timing import PhaseTimer

# What a rank does where no phase is timed: it waits for the others at the end of an update, or a callback works.
_BETWEEN = "between phases"
# In this phase the batches of the last update don't matter.
EVALUATION = "eval"
# Samples named before "and N more".
_LISTED = 8


class MicroBatch(NamedTuple):
    """What is kept of a batch: its rows, and not its tensors."""

    epoch: int
    rows: list[int]
    num_frames: int


class Whereabouts:
    """The update that this rank works on.

    Attributes:
        update: its number, from 1 on; the last one's between updates.
        micro_batches: those that it has begun with, the one under way last.
        losses: of the ones that are done, scalars on the device.
    """

    def __init__(self, rank: int, sampler: BucketSampler, timer: PhaseTimer, update: int):
        self.rank, self.update = rank, update
        self._sampler, self._timer = sampler, timer
        self.micro_batches: list[MicroBatch] = []
        self.losses: list[torch.Tensor] = []

    def begin_update(self) -> None:
        self.update += 1
        self.micro_batches, self.losses = [], []

    def begin_micro_batch(self, batch: Batch) -> None:
        self.micro_batches.append(MicroBatch(batch.epoch, batch.index, batch.num_frames))

    @property
    def phase(self) -> str:
        return self._timer.phase or _BETWEEN

    def bucket(self) -> Bucket:
        """Of the micro-batch under way, which there has to be."""
        batch = self.micro_batches[-1]
        return self._sampler.bucket_of(batch.rows[0], batch.epoch)

    def __str__(self) -> str:
        """ "rank 1, update 12, forward_backward, bucket 64px/5/1:1, samples a.mp4, b.mp4"."""
        place = f"rank {self.rank}, update {self.update}, {self.phase}"
        if self.phase == EVALUATION:
            return place
        batches = self.micro_batches  # another thread may begin an update
        return f"{place}, {self.describe(batches[-1]) if batches else 'no batch yet'}"

    def describe(self, batch: MicroBatch) -> str:
        """ "bucket 64px/5/1:1, samples a.mp4, b.mp4"."""
        table, rows = self._sampler.table, batch.rows
        more = f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
        samples = ", ".join(table.listed_path(row) for row in rows[:_LISTED])
        return f"bucket {self._sampler.bucket_of(rows[0], batch.epoch).key}, samples {samples}{more}"
