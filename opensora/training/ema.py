"""An exponential moving average of the weights, sharded as the fp32 masters are."""

from __future__ import annotations

import torch

from opensora.parallel.shards import LogicalTensor, ParameterShard


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * master, elementwise in fp32 on each rank's shards.

    bf16 would stall: at decay 0.9999 a step is below half a unit in the last place.
    """

    def __init__(self, shards: list[ParameterShard], decay: float):
        self.decay = decay
        self._shards = shards
        self._averages = [shard.master.detach().clone() for shard in shards]

    @torch.no_grad()
    def reset(self) -> None:
        """Start the average anew from the masters as they are."""
        torch._foreach_copy_(self._averages, [shard.master for shard in self._shards])

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, [shard.master for shard in self._shards], 1.0 - self.decay)

    def tensors(self) -> dict[str, LogicalTensor]:
        """This rank's boxes of every average, by parameter name: to write, or to fill."""
        return {
            shard.name: shard.as_logical(average) for shard, average in zip(self._shards, self._averages, strict=True)
        }

    def flats(self) -> list[tuple[ParameterShard, torch.Tensor]]:
        """This rank's shards, each with its average laid out as the master is."""
        return list(zip(self._shards, self._averages, strict=True))
