"""Files of weights: read memory-mapped, by name; written in shards with an index, as transformers and diffusers do."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.common import get_logger
from opensora.durable import sync_file

SHARD_BYTES = 4096 * 2**20
INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

# Where the weights of a folder are: of a checkpoint, of a diffusers pipeline (FLUX.1-dev), of any other one.
PLACES = ("model/", "transformer/", "")

# By their names in safetensors files.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class WeightSource:
    """Tensors that can be read by name.

    Attributes:
        shapes, dtypes: of all there are, by name.
        read: the named ones, on the CPU. It may be a view of a mapped file: copy it, don't write to it.
        metadata: what the files say of themselves (safetensors' metadata, an index's).
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[Sequence[str]], dict[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


# ---------------------------------------------------------------------------------------------------- reading


def open_weights(path: Path) -> WeightSource:
    """The weights in a file (.safetensors, .pt, .pth, .bin), in the files of an index (*.index.json), or in a folder:
    a checkpoint's `model/`, a diffusers pipeline's `transformer/`, an index and its shards, or one file.

    Raises:
        FileNotFoundError: a folder without weights, or an index that names an absent shard.
        ValueError: a file that is cut short or is none of weights, a folder in which several could be meant.
    """
    if path.is_file():
        return _open_shards(path) if path.name.endswith(INDEX_SUFFIX) else _open_file(path)
    files = [f"{place}{file.name}" for place in PLACES for file in sorted((path / place).glob("*")) if file.is_file()]
    return open_weights(path / choose_weights(files, str(path)))


def choose_weights(files: Sequence[str], where: str) -> str:
    """The index, or the single file, that holds the weights of a folder with these files (relative, with /).

    A safetensors index comes before any other, an index before a file, safetensors files before torch's.

    Raises:
        FileNotFoundError: there is none. ValueError: there are several. `where` is the folder, for messages.
    """
    for place in PLACES:
        here = [file for file in files if file.startswith(place) and "/" not in file[len(place) :]]
        for suffix in (".safetensors" + INDEX_SUFFIX, INDEX_SUFFIX, ".safetensors", TORCH_SUFFIXES):
            found = sorted(file for file in here if file.endswith(suffix))
            if len(found) > 1:
                kind = "indexes" if found[0].endswith(INDEX_SUFFIX) else "files of weights and no *.index.json"
                raise ValueError(
                    f"{where} has {len(found)} {kind} ({', '.join(found[:4])}{', ...' if found[4:] else ''}): "
                    f"name the one to load, e.g. {where}/{found[0]}"
                )
            if found:
                return found[0]
    raise FileNotFoundError(f"{where} has no weights: no *.index.json, no .safetensors, .pt, .pth or .bin file")


def shards_of(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says.

    Raises:
        ValueError: it is no index.
    """
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights ({error!r}): download or save it again") from error
    return shard_of


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
            f"averaged weights were asked for, and {checkpoint} has none (ema/): take a checkpoint of a run with "
            "ema_decay, or leave that out"
        )
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    saved = {name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    dtypes = {name: entry.properties.dtype for name, entry in saved.items()}

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(saved[name].size, dtype=dtypes[name]) for name in names}
        # the public dcp.load is a collective of all ranks where there are several (torch 2.6 can't be told otherwise)
        _load_state_dict(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
        return tensors

    return WeightSource({name: tuple(entry.size) for name, entry in saved.items()}, dtypes, read)


def _open_file(path: Path) -> WeightSource:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(f"{path} is no file of weights: give a .safetensors, .pt or .pth file, or a folder")


def _open_safetensors(path: Path) -> WeightSource:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download or save it again") from error
    entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    unknown = sorted({entry.get_dtype() for entry in entries.values()} - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise ValueError(f"{path} has tensors of dtype {unknown[0]}: give weights in bf16, fp16 or fp32")
    return WeightSource(
        {name: tuple(entry.get_shape()) for name, entry in entries.items()},
        {name: SAFETENSORS_DTYPES[entry.get_dtype()] for name, entry in entries.items()},
        lambda names: {name: file.get_tensor(name) for name in names},
        file.metadata() or {},
    )


def _open_torch(path: Path) -> WeightSource:
    mapped = zipfile.is_zipfile(path)  # torch's format since 2020; a file cut short is none
    try:
        state = torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} can't be read as a torch file of weights ({reason}): save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict, a dict of tensors by name: save model.state_dict() alone")
    if not mapped:
        get_logger().warning(f"{path} is in torch's old format, which is read whole: it takes its size in memory")
    return WeightSource(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tensor.dtype for name, tensor in state.items()},
        lambda names: {name: state[name] for name in names},
    )


def _open_shards(index: Path) -> WeightSource:
    shard_of = shards_of(index)
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

    return WeightSource(
        {name: shards[file].shapes[name] for name, file in shard_of.items()},
        {name: shards[file].dtypes[name] for name, file in shard_of.items()},
        read,
        next((shard.metadata for shard in shards.values()), {}),
    )


# ---------------------------------------------------------------------------------------------------- writing


class HasSize(Protocol):
    """A tensor, or what is known of one."""

    @property
    def nbytes(self) -> int: ...


def plan_shards(tensors: Mapping[str, HasSize], max_bytes: int = SHARD_BYTES) -> list[tuple[str, list[str]]]:
    """Which tensors go to which file: (file name, tensor names), in order, each file of at most `max_bytes`.

    A tensor that is larger than that has a file of its own.
    """
    shards = group_by_size({name: tensor.nbytes for name, tensor in tensors.items()}, max_bytes)
    return [(f"model-{number:05d}.safetensors", names) for number, names in enumerate(shards, start=1)]


def group_by_size(nbytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most `max_bytes` or of one name."""
    groups: list[list[str]] = []
    room = 0
    for name, number in nbytes.items():
        if not groups or number > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= number
    return groups


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file; it is on the disk when this returns."""
    path.touch()
    mode = path.stat().st_mode  # a file like any other: save_file's own are for their owner alone
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)
    sync_file(path)


def format_index(tensors: Mapping[str, HasSize], shards: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The index of the shards of `plan_shards`: total_size in MB (2**20 bytes), as ColossalAI writes it."""
    total = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    weight_map = {name: file for file, names in shards for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
