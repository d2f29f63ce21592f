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
        manifest.json         sizes and checksums of all files, and what wrote them

A save copies what this rank writes to host memory, and a thread writes the copy: to a temporary name, flushed, renamed
last (`background_save`). Only the copy makes training wait, unless the save is waited for. The memory is kept from save
to save: to touch it for the first time takes longer than the copy.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opensora.checkpoint_folder import folder_name
from opensora.common import get_logger
from opensora.models.byte_progress import size
from opensora.models.lora import FOLDER as ADAPTERS
from opensora.models.lora import adapter_files
from opensora.parallel.context import ParallelContext
from opensora.parallel.engine import Engine
from opensora.parallel.shards import ParameterShard
from opensora.parallel.snapshot import Piece, SnapshotMemory
from opensora.training.background_save import BackgroundSave, Files, Publisher, Retention, temporary_folder
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.file_writer import choose_writer
from opensora.training.local_state import FOLDER as LOCAL_STATE
from opensora.training.local_state import is_local, read_local_state, write_local_state
from opensora.training.model_files import ModelFiles
from opensora.training.sharded_state import ShardFile, Stack, load_tensors, saved_names
from opensora.training.state import TrainState
from opensora.training.versions import versions

MASTER = "master"
# Ranks wait for the one that writes longest, which on a slow disk takes longer than any collective of training.
SAVE_TIMEOUT = timedelta(days=1)


class Checkpointer:
    """Saves and restores what `engine` and `ema` hold, with the run's position. Every rank makes and calls it.

    Args:
        in_background: whether `save` returns as soon as what is saved may change again.
        retention: which checkpoints of the run stay.
        layout: how the run is laid out over its ranks, for the manifest.
    """

    def __init__(
        self,
        context: ParallelContext,
        engine: Engine,
        ema: ExponentialMovingAverage | None,
        in_background: bool = False,
        retention: Retention | None = None,
        layout: Mapping[str, Any] | None = None,
    ):
        self.context, self.engine, self.ema = context, engine, ema
        self._in_background = in_background
        self._memory = SnapshotMemory(context.device)
        self._retention, self._layout = retention or Retention(), layout or {}
        self._publisher: Publisher | None = None
        self._saving: BackgroundSave | None = None
        self._nbytes = 0

    def save(self, run_folder: Path, state: TrainState, files: Mapping[str, str], running: Mapping[str, Any]) -> Path:
        """Write a checkpoint to `run_folder`: it is on the disk when this returns, or with `in_background` after a
        `wait`. There is one at a time: this waits for the last one.

        Args:
            files: small text files of the checkpoint by name (the sampler's state, the config), written by rank 0.
            running: more numbers for `running_states.json`.

        Raises:
            OSError: on every rank, when any rank fails to write; what was saved before is intact.
        """
        self.wait()
        self._publisher = self._publisher or self._make_publisher()
        began = time.perf_counter()
        final = run_folder / folder_name(state.epoch, state.global_step)
        try:
            parts = self._everywhere(lambda: self._collect(state, files, running))
            self._nbytes = sum(self.context.gather_objects(sum(parts.sizes.values())))
            self.context.on_main(lambda: _make_room(final, self._nbytes))
        except (OSError, ValueError) as error:
            raise self._failed(final, error) from error
        self._saving = BackgroundSave(self._publisher, final, self._copy(parts))
        if self._in_background:
            seconds = time.perf_counter() - began
            get_logger().info(f"copied {size(self._nbytes)} in {seconds:.2f} s, now being written to {final}")
        else:
            self.wait()
        return final

    @property
    def saving(self) -> bool:
        """Whether a save is under way, of which no `check` or `wait` has seen the end."""
        return self._saving is not None

    def check(self) -> None:
        """After an update: notice the end of a save in the background, on all ranks in the same update.

        Raises:
            OSError: on every rank, when it failed; what was saved before is intact.
        """
        if self._saving is None:
            return
        done = torch.tensor(self._saving.done, dtype=torch.int32)
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.context.host_group)
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            OSError: as `check`.
        """
        if self._saving is None:
            return
        self._saving.wait()
        saving, self._saving = self._saving, None
        if saving.failure is not None:
            raise self._failed(saving.final, saving.failure)
        get_logger().info(f"saved {saving.final}: {size(self._nbytes)} written in {saving.seconds:.1f} s")

    def close(self) -> None:
        """`wait`, at the end of a run that may have failed already; then give the memory back."""
        try:
            self.wait()
        except OSError as error:
            get_logger().error(str(error))
        finally:
            self._memory.release()
            if self._publisher is not None:
                self._publisher.close()

    def load(self, checkpoint: Path) -> None:
        """Restore masters, moments, averages and generators of this rank. The model's weights, or its adapters, are
        loaded when it is built, from `model/` or `lora/`.

        Raises:
            ValueError, FileNotFoundError: the checkpoint lacks a part, or is of another model.
        """
        self._load_optimizer(checkpoint)
        if self.ema:
            if (checkpoint / "ema").is_dir():
                averages = {name: (tensor,) for name, tensor in self.ema.tensors().items()}
                load_tensors(checkpoint / "ema", averages, self.context.host_group)
            else:
                get_logger().warning(f"{checkpoint} has no ema/: the average starts from its weights")
                self.ema.reset()
        rng = checkpoint / "rng" / f"rank{self.context.rank}.pt"
        if rng.is_file():
            _set_generators(torch.load(rng, weights_only=True))

    # ------------------------------------------------------------------------------------------------- saving

    def _make_publisher(self) -> Publisher:
        context = self.context
        facts = {"versions": versions() if context.is_main else {}}
        facts["layout"] = {"world_size": context.world_size, **self._layout}
        group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        return Publisher(group, choose_writer(self._in_background), self._retention, facts)

    def _collect(self, state: TrainState, files: Mapping[str, str], running: Mapping) -> _Parts:
        """What this rank writes, with the memory for a copy of it."""
        self.engine.wait_for_weights()
        parts, rank = _Parts(), self.context.rank
        if not self.engine.trains_adapters:
            model = ModelFiles(self.engine)
            parts.add(model.sizes, model.pieces())
        elif self.context.is_main:
            for name, content in adapter_files(self.engine.module).items():
                parts.add_bytes(f"{ADAPTERS}/{name}", content)
        parts.add_tensors("optimizer", self._optimizer_tensors(), rank)
        if self.ema:
            averages = self.ema.tensors()
            owned = [shard.name for shard in self.engine.shards() if shard.owned]
            parts.add_tensors("ema", {name: (averages[name],) for name in owned}, rank)
        parts.add_bytes(f"rng/rank{rank}.pt", _bytes(lambda file: torch.save(_generators(), file)))
        local = {shard.name: held for shard, held in self._optimizer_states() if is_local(shard, held)}
        if local:
            parts.add_bytes(f"{LOCAL_STATE}/rank{rank}.pt", _bytes(lambda file: write_local_state(local, file)))
        if self.context.is_main:
            for name, text in {**files, **self._numbers(state, running)}.items():
                parts.add_bytes(name, text.encode())
        self._memory.reserve(parts.sizes)  # what may well fail, before ranks put parameters together in step
        return parts

    def _numbers(self, state: TrainState, running: Mapping) -> dict[str, str]:
        position = {"epoch": state.epoch, "global_step": state.global_step, "actual_update_step": state.global_step}
        numbers = {**position, "samples": state.samples, "optimizer": self.engine.optimizer_name, **running}
        return {
            "optimizer_steps.json": json.dumps(self._optimizer_steps()),
            "running_states.json": json.dumps(numbers, indent=1),
        }

    def _copy(self, parts: _Parts) -> Files | str:
        """The files in host memory, or why there are none: the other ranks, which write theirs, are told so.

        With tensor parallelism a failure is raised: the others of the group are out of step with this rank.
        """
        try:
            return Files(self._memory.take(parts.sizes, parts.pieces), parts.entries)
        except (MemoryError, RuntimeError) as error:
            if self.context.tensor.size > 1:
                raise
            return f"rank {self.context.rank}: {error}"

    def _optimizer_states(self) -> list[tuple[ParameterShard, dict[str, Any]]]:
        return [(shard, self.engine.optimizer_state(shard)) for shard in self.engine.shards()]

    def _optimizer_tensors(self) -> dict[str, Stack]:
        """Masters and moments that this rank writes, as "master+exp_avg+exp_avg_sq.parameter name"."""
        tensors = {}
        for shard, state in self._optimizer_states():
            if not shard.owned:
                continue
            kinds = {MASTER: shard.master}
            for kind, value in {} if is_local(shard, state) else state.items():
                if torch.is_tensor(value) and value.shape == shard.master.shape:
                    kinds[kind] = value
            tensors[f"{'+'.join(kinds)}.{shard.name}"] = [shard.as_logical(value) for value in kinds.values()]
        return tensors

    def _optimizer_steps(self) -> dict[str, dict[str, float]]:
        steps: dict[str, dict[str, float]] = {}
        for shard, state in self._optimizer_states():
            for kind, value in {} if is_local(shard, state) else state.items():
                if not torch.is_tensor(value) or value.shape != shard.master.shape:
                    steps.setdefault(kind, {})[shard.name] = value if isinstance(value, int) else float(value)
        return steps

    def _everywhere(self, work: Callable[[], _Parts]) -> _Parts:
        """Run `work` on all ranks; raise on all of them if it failed on any."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = f"rank {self.context.rank}: {error}"
        failures = [f for f in self.context.gather_objects(failure) if f]
        if failures:
            raise OSError(failures[0])
        return result

    def _failed(self, final: Path, why: object) -> OSError:
        return OSError(f"saving {final} failed: {why}; the checkpoints before it are intact")

    # ------------------------------------------------------------------------------------------------ loading

    def _load_optimizer(self, checkpoint: Path) -> None:
        folder = checkpoint / "optimizer"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--load {checkpoint}: it has no optimizer/, so it cannot be resumed; "
                f"start from its weights with --model.from_pretrained {checkpoint}"
            )
        self._check_optimizer(checkpoint)
        local = read_local_state(checkpoint, self.context)
        steps = json.loads((checkpoint / "optimizer_steps.json").read_text())
        keys = _keys_by_parameter(folder)
        tensors: dict[str, Stack] = {}
        for shard, state in self._optimizer_states():
            self.engine.make_optimizer_state(shard)
            if shard.name in local:
                self.engine.restore_optimizer_state(shard, local[shard.name])
            else:
                _set_numbers(state, shard, steps, self.engine.numbers_device(shard))
            for key in keys.get(shard.name, [f"{MASTER}.{shard.name}"]):
                tensors[key] = [shard.as_logical(_place(kind, shard, state)) for kind in _kinds(key)]
        load_tensors(folder, tensors, self.context.host_group)

    def _check_optimizer(self, checkpoint: Path) -> None:
        saved = read_running_states(checkpoint).get("optimizer")
        if saved not in (None, self.engine.optimizer_name):
            raise ValueError(
                f"--load {checkpoint}: its optimizer is {saved}, not {self.engine.optimizer_name}: set --optim.cls "
                f"{saved}, or start from its weights with --model.from_pretrained {checkpoint}"
            )


class _Parts:
    """Files and what they are put together from.

    Attributes:
        sizes: in bytes, by name. entries: of the indexes of sharded folders.
    """

    def __init__(self):
        self.sizes: dict[str, int] = {}
        self.entries: dict[str, list] = {}
        self._pieces: list[Iterator[Piece]] = []

    @property
    def pieces(self) -> Iterator[Piece]:
        return chain.from_iterable(self._pieces)

    def add(self, sizes: Mapping[str, int], pieces: Iterator[Piece]) -> None:
        self.sizes |= sizes
        self._pieces.append(pieces)

    def add_bytes(self, name: str, content: bytes | memoryview) -> None:
        self.add({name: len(content)}, iter([Piece(name, 0, content)]))

    def add_tensors(self, folder: str, tensors: Mapping[str, Stack], rank: int) -> None:
        file = ShardFile(tensors, rank)
        self.entries[folder] = file.entries
        if file.nbytes:
            name = f"{folder}/{file.name}"
            self.add({name: file.nbytes}, file.pieces(name))


def read_running_states(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "running_states.json"
    if not path.is_file():
        raise FileNotFoundError(f"--load {checkpoint}: it has no running_states.json, so it is not a whole checkpoint")
    return json.loads(path.read_text())


def _make_room(final: Path, nbytes: int) -> None:
    """A new folder to write to; OSError if its disk has no room for `nbytes`."""
    folder = temporary_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    free = shutil.disk_usage(final.parent).free
    if nbytes > free:
        raise OSError(
            f"it needs {size(nbytes)}, and the disk of {final.parent} has {size(free)} free: make room, set a lower "
            "--keep-n-latest, or --outputs to a folder on another disk"
        )
    folder.mkdir()


def _keys_by_parameter(folder: Path) -> dict[str, list[str]]:
    """The keys of optimizer/ by the parameter that they are of."""
    keys: dict[str, list[str]] = {}
    for key in sorted(saved_names(folder)):
        keys.setdefault(key.split(".", 1)[1], []).append(key)
    return keys


def _kinds(key: str) -> list[str]:
    return key.split(".", 1)[0].split("+")


def _place(kind: str, shard: ParameterShard, state: dict[str, Any]) -> torch.Tensor:
    """Where a saved master or moment of a shard goes; torch's optimizers make their moments in the first step."""
    if kind == MASTER:
        return shard.master
    if kind not in state:
        state[kind] = torch.zeros_like(shard.master)
    return state[kind]


def _set_numbers(
    state: dict[str, Any], shard: ParameterShard, steps: Mapping[str, Mapping[str, float]], device: torch.device
) -> None:
    for kind, values in steps.items():
        if shard.name in values:
            value = values[shard.name]  # torch counts steps in tensors, bitsandbytes in integers
            state[kind] = value if isinstance(value, int) else torch.tensor(value, device=device)


def _bytes(write: Callable[[io.BytesIO], Any]) -> memoryview:
    file = io.BytesIO()
    write(file)
    return file.getbuffer()


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
