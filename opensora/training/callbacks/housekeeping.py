"""Checkpoints on time, garbage collection out of the step."""

from __future__ import annotations

import gc

from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics


class Checkpoints(Callback):
    """Saves every `every` updates, when the ranks are asked to, and at the end of the run."""

    def __init__(self, every: int):
        self._every = every
        self._saved_at: int | None = None

    def on_start(self, trainer) -> None:
        self._saved_at = trainer.resumed_at

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if trainer.requests.save or (self._every and metrics.step % self._every == 0):
            self._save(trainer)

    def on_end(self, trainer) -> None:
        if self._saved_at != trainer.state.global_step:
            self._save(trainer)

    def _save(self, trainer) -> None:
        with trainer.timer("checkpoint", on_device=False):
            trainer.save_checkpoint()
        self._saved_at = trainer.state.global_step


class GarbageCollection(Callback):
    """Collects every `every` updates, on all ranks together, and not in between.

    Python's collector would run at another moment on each rank, and each time all ranks would wait for one.
    """

    def __init__(self, every: int = 100):
        self._every = every

    def on_start(self, trainer) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if metrics.step % self._every == 0:
            gc.collect(1)

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()
