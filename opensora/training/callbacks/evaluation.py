"""Evaluations on time, and what they found in `eval.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from opensora.common import get_logger
from opensora.training.callbacks.base import Callback
from opensora.training.evaluation import Evaluation, Evaluator
from opensora.training.run_folder import EVALUATIONS_FILE
from opensora.training.state import UpdateMetrics


class Evaluations(Callback):
    """Evaluates the weights every `every` updates and at the end of the run; not when the run is asked to stop, which
    may have to be soon: a run that is resumed makes up for it.

    listeners: are told of each evaluation; where one fails, as with a full disk, training goes on.
    """

    def __init__(self, every: int, listeners: Sequence[Callback]):
        self._every, self._listeners = every, listeners
        self._evaluated_at: int | None = None

    def on_start(self, trainer) -> None:
        self._evaluated_at = trainer.context.on_main(lambda: last_evaluated(trainer.run_folder))
        self._evaluator = Evaluator(trainer.cfg, trainer.context, trainer.loader.dataset, trainer.step)
        resumed_at = trainer.resumed_at
        if (
            resumed_at
            and resumed_at % self._every == 0
            and resumed_at not in (self._evaluated_at, trainer.total_updates)
        ):
            self._evaluate(trainer)

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        is_last = metrics.step == trainer.total_updates  # evaluated when its checkpoint is written, at the end
        if metrics.step % self._every == 0 and not is_last and not trainer.requests.stop:
            self._evaluate(trainer)

    def on_end(self, trainer) -> None:
        if self._evaluated_at != trainer.state.global_step and not trainer.requests.stop:
            self._evaluate(trainer)

    def _evaluate(self, trainer) -> None:
        with trainer.timer("eval", on_device=False):
            evaluation = self._evaluator(trainer.engine, trainer.ema, trainer.run_folder, trainer.state.global_step)
        self._evaluated_at = evaluation.step
        for listener in self._listeners:
            try:
                listener.on_evaluation(trainer, evaluation)
            except Exception as error:
                name = type(listener).__name__
                get_logger().warning(f"{name} goes without the evaluation at step {evaluation.step}: {error}")


def last_evaluated(run_folder: Path) -> int | None:
    """The step of the last evaluation that `eval.jsonl` tells of."""
    path = run_folder / EVALUATIONS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else None


class EvaluationFile(Callback):
    """One JSON object per evaluation in `eval.jsonl`, and a line in the log."""

    def __init__(self, run_folder: Path):
        self._folder = run_folder

    def on_evaluation(self, trainer, evaluation: Evaluation) -> None:
        losses = evaluation.losses
        line = {"step": evaluation.step, "averaged": evaluation.averaged, "seconds": round(evaluation.seconds, 3)}
        if losses is not None:
            line |= {"loss": losses.mean, "by_clip": losses.by_clip, "by_time": losses.by_time}
        line["samples"] = [
            {"prompt": sample.prompt, "file": sample.path.relative_to(self._folder).as_posix()}
            for sample in evaluation.samples
        ]
        with open(self._folder / EVALUATIONS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        found = [] if losses is None else [f"loss {losses.mean:.4f}"]
        found += [f"{len(evaluation.samples)} samples"] if evaluation.samples else []
        weights = "averaged weights" if evaluation.averaged else "weights"
        get_logger().info(
            f"evaluation of the {weights} at step {evaluation.step}: {', '.join(found)} in {evaluation.seconds:.1f} s"
        )
