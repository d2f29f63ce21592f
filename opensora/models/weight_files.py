"""Files of weights: read memory-mapped, by name; written in shards with an index, as transformers and diffusers do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4096 * 2**20
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightSource:
    """Tensors that can be read by name. shapes: of all there are; read: the named ones, on the CPU.

    What `read` returns may be a view of a mapped file: copy it, don't write to it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Sequence[str]], dict[str, Tensor]]


# ---------------------------------------------------------------------------------------------------- reading


def open_weights(path: Path) -> WeightSource:
    """The weights in a file (.safetensors, .pt, .pth), a checkpoint folder (its `model/`) or a sharded folder.

    Raises:
        FileNotFoundError: a folder without weights, or an index that names an absent shard.
        ValueError: a file that is cut short or is none of weights, a folder with two indexes.
    """
    if path.is_file():
        return _open_file(path)
    folder = path / "model" if (path / "model").is_dir() else path
    indexes = sorted(folder.glob("*.index.json"))
    files = sorted(file for file in folder.glob("*.safetensors"))
    if len(indexes) > 1:
        raise ValueError(f"{folder} has {len(indexes)} indexes ({indexes[0].name}, {indexes[1].name}): keep one")
    if indexes:
        return _open_shards(indexes[0])
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} has {len(files)} .safetensors files and no *.index.json: name the file to load"
        )
    return _open_file(files[0])


def open_averages(checkpoint: Path) -> WeightSource:
    """The averaged weights of a checkpoint folder, `ema/` (torch.distributed.checkpoint, any layout).

    Raises:
        FileNotFoundError: the folder has none.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    folder = checkpoint / "ema"
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(
            f"use_ema=True: {checkpoint} has no averaged weights (ema/): take a checkpoint of a run with ema_decay, "
            "or leave use_ema out"
        )
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    saved = {name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
        # the public dcp.load is a collective of all ranks where there are several (torch 2.6 can't be told otherwise)
        _load_state_dict(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        return tensors

    return WeightSource({name: tuple(entry.size) for name, entry in saved.items()}, read)


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _open_torch(path)
    raise ValueError(f"{path} is no file of weights: give a .safetensors, .pt or .pth file, or a folder")


def _open_safetensors(path: Path) -> WeightSource:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download or save it again") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return WeightSource(shapes, lambda names: {name: file.get_tensor(name) for name in names})


def _open_torch(path: Path) -> WeightSource:
    try:
        state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} can't be read as a torch file of weights ({reason}): save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict, a dict of tensors by name: save model.state_dict() alone")
    return WeightSource(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda names: {name: state[name] for name in names},
    )


def _open_shards(index: Path) -> WeightSource:
    shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards: dict[str, WeightSource] = {}
    for file in sorted(set(shard_of.values())):
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there: download or save it again")
        shards[file] = _open_file(index.parent / file)
    absent = [name for name, file in shard_of.items() if name not in shards[file].shapes]
    if absent:
        raise ValueError(f"{index} names {absent[0]} in {shard_of[absent[0]]}, which lacks it: save it again")

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: shards[shard_of[name]].read([name])[name] for name in names}

    return WeightSource({name: shards[file].shapes[name] for name, file in shard_of.items()}, read)


# ---------------------------------------------------------------------------------------------------- writing


def plan_shards(tensors: Mapping[str, Tensor], max_bytes: int = SHARD_BYTES) -> list[tuple[str, list[str]]]:
    """Which tensors go to which file: (file name, tensor names), in order, each file of at most `max_bytes`.

    A tensor that is larger than that has a file of its own.
    """
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return [(f"model-{number:05d}.safetensors", names) for number, names in enumerate(shards, start=1)]


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file; it is on the disk when this returns."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_index(folder: Path, tensors: Mapping[str, Tensor], shards: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Write the index of the shards of `plan_shards`: total_size in MB (2**20 bytes), as ColossalAI writes it."""
    total = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    weight_map = {name: file for file, names in shards for name in names}
    with open(folder / INDEX_NAME, "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
