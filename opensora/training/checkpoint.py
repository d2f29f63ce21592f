"""Checkpoints of a run: written whole or not at all, readable by any layout.

    epoch{E}-global_step{S}/
        model/                safetensors shards and index, in the training dtype: what inference loads
        lora/                 in its place, if adapters are trained: these, as peft reads them
        optimizer/            fp32 masters and moments, torch.distributed.checkpoint
        optimizer_steps.json  the optimizer's numbers by parameter (Adam's step)
        optimizer_local/      8-bit moments of every rank, in place of those in optimizer/
        ema/                  averaged weights in fp32, torch.distributed.checkpoint (with ema_decay)
        rng/                  generator states of every rank
        sampler.json, running_states.json, config.txt

A checkpoint is written under a temporary name, flushed, and renamed last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora.checkpoint_folder import folder_name, list_checkpoints
from opensora.common import get_logger
from opensora.models.lora import save_adapters
from opensora.models.weight_files import plan_shards, save_shard, write_index
from opensora.parallel.context import ParallelContext
from opensora.parallel.engine import Engine
from opensora.parallel.shards import LogicalTensor, ParameterShard
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.local_state import FOLDER as LOCAL_STATE
from opensora.training.local_state import is_local, read_local_state, write_local_state
from opensora.training.run_folder import TEMPORARY_PREFIX
from opensora.training.sharded_state import load_tensors, save_tensors, saved_names
from opensora.training.state import TrainState

MASTER = "master"


class Checkpointer:
    """Saves and restores what `engine` and `ema` hold, with the run's position."""

    def __init__(self, context: ParallelContext, engine: Engine, ema: ExponentialMovingAverage | None):
        self.context, self.engine, self.ema = context, engine, ema

    def save(self, run_folder: Path, state: TrainState, files: Mapping[str, str], running: Mapping[str, Any]) -> Path:
        """Write a checkpoint to `run_folder`. Every rank calls it; it returns when the checkpoint is on the disk.

        Args:
            files: small text files of the checkpoint by name (the sampler's state, the config), written by rank 0.
            running: more numbers for `running_states.json`.

        Raises:
            OSError: on every rank, when any rank fails to write; what was saved before is intact.
        """
        final = run_folder / folder_name(state.epoch, state.global_step)
        temporary = run_folder / (TEMPORARY_PREFIX + final.name)
        try:
            self._everywhere(lambda: _make_folder(temporary), only_main=True)
            self._everywhere(lambda: self._write_local(temporary, state, files, running))
            save_tensors(temporary / "optimizer", self._optimizer_tensors(), self.context.host_group)
            if self.ema:
                save_tensors(temporary / "ema", self.ema.tensors(), self.context.host_group)
            self._everywhere(lambda: _publish(temporary, final), only_main=True)
        except Exception as error:
            if self.context.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"saving {final} failed: {error}; the checkpoints before it are intact") from error
        return final

    def load(self, checkpoint: Path) -> None:
        """Restore masters, moments, averages and generators of this rank. The model's weights, or its adapters, are
        loaded when it is built, from `model/` or `lora/`.

        Raises:
            ValueError, FileNotFoundError: the checkpoint lacks a part, or is of another model.
        """
        self._load_optimizer(checkpoint)
        if self.ema:
            if (checkpoint / "ema").is_dir():
                load_tensors(checkpoint / "ema", self.ema.tensors(), self.context.host_group)
            else:
                get_logger().warning(f"{checkpoint} has no ema/: the average starts from its weights")
                self.ema.reset()
        rng = checkpoint / "rng" / f"rank{self.context.rank}.pt"
        if rng.is_file():
            _set_generators(torch.load(rng, weights_only=True))

    def _load_optimizer(self, checkpoint: Path) -> None:
        folder = checkpoint / "optimizer"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--load {checkpoint}: it has no optimizer/, so it cannot be resumed; "
                f"start from its weights with --model.from_pretrained {checkpoint}"
            )
        self._check_optimizer(checkpoint)
        local = read_local_state(checkpoint, self.context)
        saved = saved_names(folder)
        kinds = {key.split(".", 1)[0] for key in saved} - {MASTER}
        steps = json.loads((checkpoint / "optimizer_steps.json").read_text())
        for shard, state in self._optimizer_states():
            self.engine.make_optimizer_state(shard)
            if shard.name in local:
                self.engine.restore_optimizer_state(shard, local[shard.name])
                continue
            for kind in kinds:
                if f"{kind}.{shard.name}" in saved and kind not in state:
                    state[kind] = torch.zeros_like(shard.master)
            for kind, values in steps.items():
                if shard.name in values:
                    value = values[shard.name]  # torch counts steps in tensors, bitsandbytes in integers
                    state[kind] = value if isinstance(value, int) else torch.tensor(value, device=shard.master.device)
        load_tensors(folder, self._optimizer_tensors(), self.context.host_group)

    def _check_optimizer(self, checkpoint: Path) -> None:
        saved = read_running_states(checkpoint).get("optimizer")
        if saved not in (None, self.engine.optimizer_name):
            raise ValueError(
                f"--load {checkpoint}: its optimizer is {saved}, not {self.engine.optimizer_name}: set --optim.cls "
                f"{saved}, or start from its weights with --model.from_pretrained {checkpoint}"
            )

    def _optimizer_states(self) -> list[tuple[ParameterShard, dict[str, Any]]]:
        return [(shard, self.engine.optimizer_state(shard)) for shard in self.engine.shards()]

    def _optimizer_tensors(self) -> dict[str, LogicalTensor]:
        """Masters and moments as "kind.parameter name"."""
        tensors = {}
        for shard, state in self._optimizer_states():
            tensors[f"{MASTER}.{shard.name}"] = shard.as_logical(shard.master)
            for kind, value in {} if is_local(shard, state) else state.items():
                if torch.is_tensor(value) and value.shape == shard.master.shape:
                    tensors[f"{kind}.{shard.name}"] = shard.as_logical(value)
        return tensors

    def _optimizer_steps(self) -> dict[str, dict[str, float]]:
        steps: dict[str, dict[str, float]] = {}
        for shard, state in self._optimizer_states():
            for kind, value in {} if is_local(shard, state) else state.items():
                if not torch.is_tensor(value) or value.shape != shard.master.shape:
                    steps.setdefault(kind, {})[shard.name] = value if isinstance(value, int) else float(value)
        return steps

    def _write_local(self, folder: Path, state: TrainState, files: Mapping[str, str], running: Mapping) -> None:
        """What this rank writes without the others: its share of the model's shards, its generators."""
        self.engine.wait_for_weights()
        if not self.engine.trains_adapters:
            self._write_model(folder / "model")
        elif self.context.is_main:
            save_adapters(self.engine.module, folder / "lora")
        _write_synced(folder / "rng" / f"rank{self.context.rank}.pt", lambda f: torch.save(_generators(), f))
        local = {shard.name: held for shard, held in self._optimizer_states() if is_local(shard, held)}
        if local:
            (folder / LOCAL_STATE).mkdir(exist_ok=True)
            _write_synced(folder / LOCAL_STATE / f"rank{self.context.rank}.pt", lambda f: write_local_state(local, f))
        if not self.context.is_main:
            return
        position = {"epoch": state.epoch, "global_step": state.global_step, "actual_update_step": state.global_step}
        texts = {
            **files,
            "optimizer_steps.json": json.dumps(self._optimizer_steps()),
            "running_states.json": json.dumps(
                {**position, "samples": state.samples, "optimizer": self.engine.optimizer_name, **running}, indent=1
            ),
        }
        for name, text in texts.items():
            _write_synced(folder / name, lambda f, text=text: f.write(text.encode()))

    def _write_model(self, folder: Path) -> None:
        """This rank's share of the model's shards; rank 0 writes the index."""
        weights = {name: parameter.detach() for name, parameter in self.engine.module.state_dict().items()}
        shards = plan_shards(weights)
        folder.mkdir(exist_ok=True)
        for index in range(self.context.rank, len(shards), self.context.world_size):
            name, keys = shards[index]
            save_shard(folder / name, {key: weights[key] for key in keys})
        if self.context.is_main:
            write_index(folder, weights, shards)

    def _everywhere(self, work: Callable[[], None], only_main: bool = False) -> None:
        """Run `work` on all ranks (or rank 0); raise on all of them if it failed on any."""
        failure = None
        if self.context.is_main or not only_main:
            try:
                work()
            except Exception as error:
                failure = f"rank {self.context.rank}: {error}"
        failures = [f for f in self.context.gather_objects(failure) if f]
        if failures:
            raise OSError(failures[0])


def read_running_states(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "running_states.json"
    if not path.is_file():
        raise FileNotFoundError(f"--load {checkpoint}: it has no running_states.json, so it is not a whole checkpoint")
    return json.loads(path.read_text())


def prune(run_folder: Path, keep_n_latest: int | None) -> None:
    """Remove all but the newest checkpoints of a run; renamed first, so that none is ever half there."""
    if not keep_n_latest or keep_n_latest < 1:
        return
    for old in list_checkpoints(run_folder)[:-keep_n_latest]:
        doomed = old.with_name(TEMPORARY_PREFIX + "old-" + old.name)
        old.rename(doomed)
        shutil.rmtree(doomed)


def _make_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "rng").mkdir(parents=True)


def _publish(temporary: Path, final: Path) -> None:
    """Give a written checkpoint its final name, on the disk before this returns."""
    for folder, _, _ in os.walk(temporary):
        _sync_folder(Path(folder))
    if final.exists():  # the same step saved again, after a resume
        doomed = final.with_name(TEMPORARY_PREFIX + "old-" + final.name)
        final.rename(doomed)
        temporary.rename(final)
        shutil.rmtree(doomed)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, write: Callable) -> None:
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _generators() -> dict[str, Any]:
    """The states of this process's global generators, in types that torch.load reads without pickled code."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
