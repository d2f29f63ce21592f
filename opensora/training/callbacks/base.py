"""What is not training happens in callbacks, at these moments of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opensora.data.batch import Batch
    from opensora.training.evaluation import Evaluation
    from opensora.training.state import UpdateMetrics
    from opensora.training.trainer import Trainer


class Callback:
    """Called on every rank. A callback that only rank 0 needs does nothing on the others."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first update."""

    def before_update(self, trainer: Trainer) -> None:
        """Before an update's first micro-batch is waited for; there may be none."""

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        """For each micro-batch of this rank, before it is used."""

    def on_update(self, trainer: Trainer, metrics: UpdateMetrics) -> None:
        """After each optimizer update."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """After each evaluation of the weights."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last update; not after an error."""

    def close(self) -> None:
        """Release what is held, also after an error."""
