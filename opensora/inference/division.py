"""How ranks share a pipeline's models: the transformer by tokens and layers, the autoencoder by samples and tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from opensora.parallel.context import ALONE, ParallelContext, RankGroup
from opensora.parallel.sequence import split_sequence
from opensora.parallel.sharing import share_autoencoder
from opensora.parallel.tensor import split_layers
from opensora.settings import parallel_sizes


@dataclass(frozen=True)
class Division:
    """The ranks that share a transformer's layers (`tensor`), its tokens (`sequence`, in `mode`), both (`model`), and
    an autoencoder."""

    model: RankGroup = ALONE
    tensor: RankGroup = ALONE
    sequence: RankGroup = ALONE
    mode: str = "all_to_all"
    autoencoder: RankGroup = ALONE

    @classmethod
    def of(cls, cfg, context: ParallelContext) -> Division:
        """What `plugin` and `plugin_ae` ask for; `context` is that of `ParallelContext.share_samples`."""
        autoencoder = context.model if cfg.plugin_ae == "hybrid" else ALONE
        return cls(context.model, context.tensor, context.sequence, parallel_sizes(cfg).mode, autoencoder)

    def divide_transformer(self, model: nn.Module) -> None:
        """Keep this rank's part of a loaded transformer. Before it is compiled."""
        split_layers(model, self.tensor)
        split_sequence(model, self.sequence, self.mode)

    def divide_autoencoder(self, autoencoder: nn.Module) -> None:
        if self.autoencoder.process_group is not None:
            share_autoencoder(autoencoder, self.autoencoder.process_group)


UNDIVIDED = Division()
