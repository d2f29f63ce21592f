"""The loss of samples that stay the same, at times that stay the same, with noise that stays the same.

A training loss is mostly the luck of its batch, times and noise. Here nothing changes from one evaluation to the next
but the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from opensora.common import get_logger
from opensora.data.batch import Batch
from opensora.data.bucket import Bucket, BucketTable
from opensora.data.loader import VideoTextDataset, WorkerDiedError, build_loader
from opensora.data.sampler import NUM_SUBSTITUTES, SampleRequest
from opensora.diffusion.random import derive_seed
from opensora.parallel.context import ParallelContext
from opensora.parallel.shared_batches import receive_batches, send_batches
from opensora.training.step import FlowMatchingStep, StepInputs


class HeldOutRows(NamedTuple):
    """Rows of a table that share a bucket: a batch.

    Attributes:
        substitutes: for each row others of its bucket, in case that it can't be read; no row is one for two.
    """

    bucket: Bucket
    rows: list[int]
    substitutes: list[tuple[int, ...]]

    def requests(self, seed: int, place: int) -> list[SampleRequest]:
        """What a dataset is asked for to read them; the batch tells `place` as its update."""
        size = self.bucket.num_frames, self.bucket.height, self.bucket.width
        return [
            SampleRequest(row, *size, 0, others, derive_seed(seed, "held out", row), place, 0)
            for row, others in zip(self.rows, self.substitutes, strict=True)
        ]


def choose_rows(
    dataset: VideoTextDataset, buckets: BucketTable, per_clip: int, seed: int, ranks: int
) -> list[HeldOutRows]:
    """At most `per_clip` rows of each clip size and length, the same in every run with this seed, in batches that are
    no larger than training's and of which every rank can get some.

    Raises:
        ValueError: no row is in a bucket.
    """
    table = dataset.table
    ids = buckets.assign(table.num_frames, table.height, table.width, table.fps, seed).ids
    order = np.random.default_rng(seed).permutation(len(ids))
    order = order[ids[order] >= 0]
    keys = [bucket.clip_key for bucket in buckets.buckets]
    clips = np.unique(keys, return_inverse=True)[1][ids[order]]  # [N] which clip size and length each row has
    batches = []
    for clip in np.unique(clips):
        rows = order[clips == clip][:per_clip]
        for bucket_id in np.unique(ids[rows]):
            bucket, members = buckets.buckets[bucket_id], sorted(rows[ids[rows] == bucket_id].tolist())
            others = np.setdiff1d(order[ids[order] == bucket_id], members).tolist()
            spare = [tuple(others[i :: len(members)][:NUM_SUBSTITUTES]) for i in range(len(members))]
            size = min(bucket.batch_size, -(-len(members) // ranks))
            parts = [slice(start, start + size) for start in range(0, len(members), size)]
            batches += [HeldOutRows(bucket, members[part], spare[part]) for part in parts]
    if not batches:
        raise ValueError(f"eval_data_path='{table.file}': none of its rows is in a bucket of bucket_config")
    return batches


@dataclass(frozen=True)
class Losses:
    """Means over the held-out samples.

    Attributes:
        by_clip: {"256px/33": loss}, over all times. by_time: {"0.5": loss}, over all clips.
    """

    mean: float
    by_clip: dict[str, float]
    by_time: dict[str, float]


class HeldOutLoss:
    """The flow-matching loss of fixed samples.

    Args:
        dataset: has the samples. in_worker: read them in a process of its own, which a file may crash.
        batches: of all ranks, see `choose_rows`; their encoded form waits on the host. Of ranks that see the same
            samples the first one reads. A batch of which nothing can be read is left out.
        encode: makes the step's inputs of them, without dropping texts; used here alone.
        step: computes the loss.
        times: in (0, 1], where 1 is noise.
        seed: of the noise of each sample, and of the condition that it is given.

    Raises:
        ValueError: no rank can read any sample.
    """

    def __init__(
        self,
        dataset: VideoTextDataset,
        batches: Sequence[HeldOutRows],
        encode: Callable[[Batch], StepInputs],
        step: FlowMatchingStep,
        times: Sequence[float],
        seed: int,
        context: ParallelContext,
        in_worker: bool,
    ):
        self._step, self._times, self._context = step, list(times), context
        self._clips = list(dict.fromkeys(batch.bucket.clip_key for batch in batches))
        self._inputs: list[tuple[int, StepInputs]] = []
        mine = batches[context.data_parallel_rank :: context.data_parallel_size]
        requests = [rows.requests(seed, place) for place, rows in enumerate(mine)]
        for batch in _shared(lambda: _readable(_reading_files(dataset), requests, in_worker), context):
            for rejected in batch.rejected:
                get_logger().warning(f"evaluation goes without {rejected['path']}: {rejected['reason']}")
            inputs = _moved(encode(batch), torch.device("cpu"))
            self._inputs.append((self._clips.index(mine[batch.update].bucket.clip_key), inputs))
        found = context.sum_over_all(torch.tensor(float(len(self._inputs)), device=context.device))
        if not found:
            raise ValueError(
                f"none of the samples of '{dataset.table.file}' that are to be evaluated can be read: check "
                "eval_data_path, or set --eval-samples 0"
            )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Losses:
        """Over all ranks, which all call it."""
        device = self._step.device
        sums = torch.zeros(2, len(self._clips), len(self._times), dtype=torch.float64, device=device)  # losses, samples
        for clip, inputs in self._inputs:
            inputs = _moved(inputs, device)
            for place, time in enumerate(self._times):
                loss = self._step.loss(model, replace(inputs, t=torch.full_like(inputs.t, time)))
                sums[0, clip, place] += loss.double() * len(inputs.t)
                sums[1, clip, place] += len(inputs.t)
        losses, counts = self._context.sum_over_all(sums).cpu()  # [clips, times] each
        return Losses(
            mean=_mean(losses, counts),
            by_clip={clip: _mean(losses[i], counts[i]) for i, clip in enumerate(self._clips) if counts[i].any()},
            by_time={f"{time:g}": _mean(losses[:, i], counts[:, i]) for i, time in enumerate(self._times)},
        )


def _readable(dataset: VideoTextDataset, requests: Sequence[list[SampleRequest]], in_worker: bool) -> Iterator[Batch]:
    """The batches of which a sample can be read."""
    left = list(requests)
    while left:
        try:
            for batch in build_loader(dataset, list(left), int(in_worker)):
                del left[0]
                yield batch
        except WorkerDiedError:
            raise
        except ValueError as error:
            get_logger().warning(f"evaluation goes without a batch: {error}")
            del left[0]


def _shared(read: Callable[[], Iterator[Batch]], context: ParallelContext) -> Iterator[Batch]:
    """Batches on the host, read by the first of the ranks that see the same samples."""
    if context.model.size == 1:
        return read()
    if context.model.rank == 0:
        return send_batches(read(), context.model)
    return receive_batches(context.model, torch.device("cpu"))


def _reading_files(dataset: VideoTextDataset) -> VideoTextDataset:
    """The dataset without its caches, which need not hold what is asked for."""
    plain = copy.copy(dataset)
    plain.use_caches(None, None)
    return plain


def _mean(sums: Tensor, counts: Tensor) -> float:
    return float(sums.sum() / counts.sum())


def _moved(inputs: StepInputs, device: torch.device) -> StepInputs:
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return StepInputs(**{name: None if value is None else value.to(device) for name, value in values.items()})
