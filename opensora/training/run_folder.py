"""The folder of a run: its name, its lock, the resolved config, the metrics up to where it starts."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import IO

from opensora.checkpoint_folder import list_checkpoints, parse_folder_name
from opensora.common import get_logger, log_to_file
from opensora.durable import HeldError, hold

METRICS_FILE = "metrics.jsonl"
REJECTED_FILE = "rejected.jsonl"
EVALUATIONS_FILE = "eval.jsonl"
TEMPORARY_PREFIX = ".tmp-"
# What a whole checkpoint is named while one of the same step takes its place.
REPLACED_PREFIX = TEMPORARY_PREFIX + "replaced-"
# What a checkpoint is named when the run went on from an older one. None with this name is listed or pruned.
ABANDONED_PREFIX = "abandoned-"


def default_experiment_name(config_file: str, now: datetime) -> str:
    """`configs/diffusion/train/stage1.py` -> `261122_160300-diffusion_train_stage1`."""
    parts = Path(config_file).with_suffix("").parts
    if "configs" in parts:
        parts = parts[parts.index("configs") + 1 :]
    return f"{now:%y%m%d_%H%M%S}-{'_'.join(part for part in parts if part not in ('/', '..', '.'))}"


class RunFolder:
    """A run's folder, held by one run at a time. Made and used on rank 0 alone.

    Args:
        patience_s: seconds to wait for a run that holds it and may be ending.

    Raises:
        ValueError: another run holds the folder.
    """

    def __init__(self, path: Path, patience_s: float = 0.0):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold(time.monotonic() + patience_s)
        _tidy(path)

    def check_new(self) -> None:
        """ValueError if a new run would write over one that has checkpoints."""
        if list_checkpoints(self.path):
            raise ValueError(
                f"exp_name='{self.path.name}': {self.path} already holds checkpoints; "
                f"continue it with --load {self.path}, or choose another --exp-name"
            )

    def _hold(self, until: float) -> IO[str]:
        while True:
            try:
                return hold(self.path / ".lock")
            except HeldError as error:
                if time.monotonic() > until:
                    raise ValueError(
                        f"{self.path} is in use by another run ({error.holder}); stop it, or choose another --exp-name"
                    ) from None
                time.sleep(0.2)

    def write_config(self, text: str) -> None:
        (self.path / "config.txt").write_text(text)

    def start_log(self) -> None:
        """Append the logger's lines to `log.txt` from here on."""
        self._log = log_to_file(self.path / "log.txt")

    def close(self) -> None:
        """Let another run have the folder."""
        get_logger().removeHandler(self._log)
        self._log.close()
        self._lock.close()

    def cut_checkpoints(self, global_step: int) -> None:
        """Set aside the checkpoints of updates after `global_step`: this run makes its own of them."""
        later = [found for found in list_checkpoints(self.path) if parse_folder_name(found)[1] > global_step]
        for checkpoint in later:
            checkpoint.rename(_unused(checkpoint.with_name(ABANDONED_PREFIX + checkpoint.name)))
        if later:
            get_logger().warning(
                f"{self.path}: {len(later)} checkpoint(s) of updates after {global_step}, from which this run goes on, "
                f"are now named {ABANDONED_PREFIX}*; remove them when you don't need them"
            )

    def cut_metrics(self, global_step: int) -> None:
        """Drop the lines of updates after `global_step`, which will be done again, and a line cut short by a kill."""
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            if (self.path / name).exists():
                _cut(self.path / name, global_step)


def _tidy(path: Path) -> None:
    """Remove what saves that did not end left; what one of them was about to replace gets its name back."""
    for replaced in path.glob(REPLACED_PREFIX + "*"):
        final = path / replaced.name.removeprefix(REPLACED_PREFIX)
        if not final.exists():
            replaced.rename(final)
    for unfinished in path.glob(TEMPORARY_PREFIX + "*"):
        shutil.rmtree(unfinished)


def _unused(path: Path) -> Path:
    """`path`, or with a number if there is such a one already."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return next(found for found in chain([path], numbered) if not found.exists())


def _cut(path: Path, global_step: int) -> None:
    """Keep the lines of a file of JSON lines that are of updates up to `global_step`."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= global_step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(line + "\n" for line in kept))
    shorter.replace(path)
