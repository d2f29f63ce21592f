"""Training runs inside a pool of ranks, and what they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from opensora.checkpoint_folder import list_checkpoints
from opensora.config import load_config
from opensora.models.weight_files import open_averages, open_weights
from opensora.training.settings import TrainSettings, check_paths, require_available, validate
from opensora.training.trainer import Trainer


def train(context, root: Path, arguments: list[str]) -> None:
    """What train.py does, in a process group that is already there."""
    os.chdir(root)
    cfg = load_config(arguments, TrainSettings)
    validate(cfg, context.world_size)
    require_available(cfg)
    check_paths(cfg)
    Trainer(cfg, context).run()


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def numbers(run_folder: Path) -> list[tuple]:
    """What each update computed, without how long it took."""
    keys = ("step", "epoch", "loss", "grad_norm", "lr", "samples", "tokens")
    return [tuple(line[key] for key in keys) for line in metrics(run_folder)]


def assert_same_end(run: Path, other: Path) -> None:
    """The newest checkpoints of two runs have bitwise equal weights and averages."""
    for open_ in (open_weights, open_averages):
        first, second = (open_(list_checkpoints(folder)[-1]) for folder in (run, other))
        assert first.shapes == second.shapes
        names = list(first.shapes)
        a, b = first.read(names), second.read(names)
        different = [name for name in names if not torch.equal(a[name], b[name])]
        assert not different, different
