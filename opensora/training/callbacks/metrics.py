"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from opensora.common import get_logger
from opensora.models.text import cut_summary
from opensora.training.callbacks.base import Callback
from opensora.training.callbacks.evaluation_media import add_samples, evaluation_scalars, wandb_samples
from opensora.training.evaluation import Evaluation
from opensora.training.run_folder import METRICS_FILE, REJECTED_FILE
from opensora.training.state import UpdateMetrics


class MetricsFile(Callback):
    """One JSON object per update in `metrics.jsonl`, written at once: a killed run has all its lines."""

    def __init__(self, run_folder: Path):
        self._file = open(run_folder / METRICS_FILE, "a", buffering=1)  # noqa: SIM115 - held for the run

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        self._file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def close(self) -> None:
        self._file.close()


class RejectedSamples(Callback):
    """Samples that could not be read, with the reason and what replaced them, in `rejected.jsonl`.

    Every rank appends its own; a line is short enough for the file system to append it whole.
    """

    def __init__(self, run_folder: Path):
        self._path = run_folder / REJECTED_FILE
        self._warned = False

    def on_batch(self, trainer, batch) -> None:
        if not batch.rejected:
            return
        if not self._warned:
            reason = batch.rejected[0].get("reason", "")
            get_logger().warning(f"a sample cannot be read and was replaced ({reason}); all such are in {self._path}")
            self._warned = True
        with open(self._path, "a") as file:
            file.writelines(json.dumps(rejected) + "\n" for rejected in batch.rejected)


class CutCaptions(Callback):
    """Says at the end of a run how many captions were longer than their encoder's `max_length`, over all ranks."""

    def on_end(self, trainer) -> None:
        for name, encoder in trainer.step.text.encoders.items():
            counts = torch.tensor([encoder.texts_seen, encoder.texts_cut, encoder.tokens_cut])
            seen, cut, tokens = trainer.context.sum(counts.to(trainer.context.device)).tolist()
            if cut:
                get_logger().info(cut_summary(name, encoder.max_length, seen, cut, tokens))


def scalars(metrics: UpdateMetrics) -> dict[str, float]:
    """The plotted numbers of an update by name; "loss" is the documented one."""
    seconds = sum(metrics.seconds.values()) - metrics.seconds.get("eval", 0.0)
    return {
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "epoch": metrics.epoch,
        "skipped": metrics.skipped,
        "samples_per_second": metrics.samples / seconds,
        "tokens_per_second": metrics.tokens / seconds,
        **{f"seconds/{phase}": value for phase, value in metrics.seconds.items()},
    }


class TensorBoard(Callback):
    """Scalars every `every` updates under `tensorboard/`; the x axis counts updates."""

    def __init__(self, run_folder: Path, every: int, purge_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Points after the step that a run resumes from were drawn by the run it replaces.
        self._writer = SummaryWriter(run_folder / "tensorboard", purge_step=purge_step + 1 if purge_step else None)
        self._every = every

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if metrics.step % self._every == 0:
            for name, value in scalars(metrics).items():
                self._writer.add_scalar(name, value, metrics.step)

    def on_evaluation(self, trainer, evaluation: Evaluation) -> None:
        for name, value in evaluation_scalars(evaluation).items():
            self._writer.add_scalar(name, value, evaluation.step)
        add_samples(self._writer, evaluation)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Callback):
    """The same scalars in Weights & Biases: online with a login, else offline under the run folder."""

    def __init__(self, run_folder: Path, every: int, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb=True needs the package wandb: pip install wandb, or leave --wandb out") from None
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
        options = {"project": project, "name": run_folder.name, "dir": run_folder, "config": config}
        try:
            self._run = wandb.init(mode=mode, settings=wandb.Settings(init_timeout=60), **options)
        except wandb.errors.Error as error:
            get_logger().warning(f"Weights & Biases cannot be reached ({error}); logging offline")
            self._run = wandb.init(mode=(mode := "offline"), **options)
        if mode == "offline":
            get_logger().info(
                f"Weights & Biases logs offline; upload later with: wandb sync {run_folder}/wandb/offline-*"
            )
        self._every = every

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if metrics.step % self._every == 0:
            self._run.log(scalars(metrics), step=metrics.step)

    def on_evaluation(self, trainer, evaluation: Evaluation) -> None:
        self._run.log(evaluation_scalars(evaluation), step=evaluation.step)
        self._run.log(wandb_samples(evaluation), step=evaluation.step)

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # closed on the way out of the trainer, with what ended it still raised
        self._run.finish(exit_code=int(failed))


def _has_login() -> bool:
    """Whether there is a key for the server, in the places where `wandb login` documents it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False
