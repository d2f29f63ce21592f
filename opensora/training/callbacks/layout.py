"""What a run is made of, said at its start: ranks and their groups, batches, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch

from opensora.common import get_logger
from opensora.models.byte_progress import size
from opensora.parallel.context import ParallelContext
from opensora.settings import parallel_sizes
from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics


class Layout(Callback):
    """Logs the layout of the job before the first update, and the optimizer's memory, once it has any, after it."""

    def on_start(self, trainer) -> None:
        log, cfg, context = get_logger(), trainer.cfg, trainer.context
        log.info(f"{describe_ranks(context, parallel_sizes(cfg).mode)}, plugin {cfg.plugin}, {cfg.dtype}")
        for line in describe_batches(cfg.bucket_config, context.data_parallel_size, cfg.accumulation_steps):
            log.info(line)
        parameters = list(trainer.engine.module.parameters())
        count, trained = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
        whole = "" if context.tensor.size == 1 else " of its part"
        only = f", {trained:,} of them trained" if trained < count else ""
        log.info(f"model: {count:,} parameters{whole}{only}")
        masters = sum(shard.master.nbytes for shard in trainer.engine.shards())
        memory = {"weights": sum(p.nbytes for p in parameters), "fp32 masters": masters}
        if trainer.ema:
            memory["averages"] = masters
        log.info("this rank holds " + ", ".join(f"{size(count)} of {name}" for name, count in memory.items()))

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if metrics.step != trainer.resumed_at + 1 if trainer.resumed_at else metrics.step > 1:
            return
        engine = trainer.engine
        states = [engine.optimizer_state(shard) for shard in engine.shards()]
        held = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
        get_logger().info(f"this rank holds {size(held)} of the optimizer's state ({engine.optimizer_name})")


def describe_ranks(context: ParallelContext, mode: str) -> str:
    """The world and its groups, in a line."""
    ranks = f"{context.world_size} rank{'s' * (context.world_size > 1)} on {context.device.type}"
    if context.model.size == 1:
        return ranks
    sizes = [f"{context.data.size} data-parallel"]
    if context.sequence.size > 1:
        sizes.append(f"{context.sequence.size} sequence-parallel ({mode})")
    if context.tensor.size > 1:
        sizes.append(f"{context.tensor.size} tensor-parallel")
    together = context.model.size
    groups = [f"{first}-{first + together - 1}" for first in range(0, context.world_size, together)]
    shown = ", ".join(groups if len(groups) <= 4 else [*groups[:3], "...", groups[-1]])
    return f"{ranks} = {' x '.join(sizes)}; ranks of the same samples: {shown}"


def describe_batches(bucket_config: Mapping[str, Mapping], ranks: int, accumulation: int) -> Iterator[str]:
    """Samples of an update by resolution and frames; lengths of like batches are put together."""
    for resolution, by_frames in bucket_config.items():
        parts = []
        for batch, frames in groupby(sorted(by_frames), key=lambda count: by_frames[count][1]):
            counts = list(frames)
            span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            parts.append(f"{span}: {batch * ranks * accumulation}")
        if parts:
            how = f"batch x {ranks} x {accumulation} micro-batches" if accumulation > 1 else f"batch x {ranks}"
            yield f"samples of an update ({how}) at {resolution}, by frames: {'; '.join(parts)}"
