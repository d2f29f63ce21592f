"""A bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from opensora.common import get_logger
from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics


class Progress(Callback):
    """Loss, gradient norm, learning rate and samples per second: of every update on a terminal's bar, and as a line
    every `every` updates in the log."""

    def __init__(self, every: int):
        self._every = every
        self._bar: tqdm | None = None
        self._redirect = None

    def on_start(self, trainer) -> None:
        if sys.stderr.isatty():
            self._redirect = logging_redirect_tqdm([get_logger()])
            self._redirect.__enter__()
            self._bar = tqdm(
                total=trainer.total_updates,
                initial=trainer.state.global_step,
                unit="step",
                mininterval=0.5,
                dynamic_ncols=True,
            )
        self._begin_window()

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        self._samples += metrics.samples
        self._updates += 1
        self._evaluating += metrics.seconds.get("eval", 0.0)
        seconds = time.perf_counter() - self._since
        shown = {
            "loss": f"{metrics.loss:.4f}",
            "grad_norm": f"{metrics.grad_norm:.3f}",
            "lr": f"{metrics.lr:.2e}",
            "samples/s": f"{self._samples / (seconds - self._evaluating):.1f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        if metrics.step % self._every == 0 or metrics.step == trainer.total_updates:
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = (trainer.total_updates - metrics.step) * seconds / self._updates
            line = f"epoch {metrics.epoch}  step {metrics.step}/{trainer.total_updates}  {values}  left {_clock(left)}"
            get_logger().info(line)
            self._begin_window()

    def _begin_window(self) -> None:
        self._since, self._samples, self._updates, self._evaluating = time.perf_counter(), 0, 0, 0.0

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
