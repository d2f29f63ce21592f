"""A model's weights into another file or folder, in any of the published layouts, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.common import get_logger
from opensora.durable import sync_folder, write_synced
from opensora.models.byte_progress import ByteProgress, size
from opensora.models.mmdit.convert import Conversion, plan_conversion
from opensora.models.mmdit.infer import check_whole
from opensora.models.mmdit.layouts import LAYOUTS, OPEN_SORA, Layout, describe, layout_of
from opensora.models.sources import find_weights, open_model, run_settings, source_layout
from opensora.models.weight_files import (
    INDEX_SUFFIX,
    TORCH_SUFFIXES,
    WeightSource,
    group_by_size,
)
from opensora.models.weight_stream import TensorSpec, stream_safetensors
from opensora.models.weights import in_runs

DIFFUSERS_NAME = "diffusion_pytorch_model"  # of the files in a folder of diffusers
FLUX_AXES = {128: (16, 56, 56)}  # rotary dimensions of the published models, by those of a head


@dataclass(frozen=True)
class ExportOptions:
    """How weights are written.

    Attributes:
        to: the layout, one of "open-sora", "flux", "diffusers". source: a key of LAYOUTS that overrides what is found.
        dtype: of what is written; None: as they are. ema: the averaged weights of a checkpoint.
        max_shard_bytes: size of the files of a folder. axes_dim: rotary dimensions, for diffusers' config.json.
        force: replace what is there.
        lora, lora_scale: adapters that are merged, and how strongly; those of a checkpoint of adapters are by itself.
    """

    to: str
    source: str | None = None
    dtype: torch.dtype | None = None
    ema: bool = False
    max_shard_bytes: int = 4 * 10**9
    axes_dim: tuple[int, ...] | None = None
    force: bool = False
    lora: Path | None = None
    lora_scale: float = 1.0


def export_weights(from_pretrained: str | Sequence[str], out: Path, options: ExportOptions) -> None:
    """Write the weights that `from_pretrained` names to `out`: a .safetensors file, or a folder of shards and an index.

    It is written under a temporary name, flushed and renamed: `out` is whole or not there. What is in memory at a time
    is one tensor.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: in one line, before anything is written.
    """
    _check_out(out, options.force)
    path = find_weights(from_pretrained)
    source = open_model(path, options.ema, options.lora, options.lora_scale)
    layout = _layout(source, path, options.source)
    settings = check_whole(plan_conversion(source.shapes, layout, OPEN_SORA).shapes(source.shapes), str(path))
    config = None
    if options.to == "diffusers":
        config = diffusers_config(settings, run_settings(path), options.axes_dim, str(path))
    conversion = plan_conversion(source.shapes, layout, LAYOUTS[options.to])
    specs = _specs(source, conversion, options.dtype)
    total = sum(spec.nbytes for spec in specs.values())
    _check_space(out, total)
    _say(path, layout, specs, options)

    with _renamed_when_done(out, options.force) as temporary, ByteProgress(f"writing {out}", total) as progress:
        writer = _Writer(specs, _Reader(source, conversion, specs), options.to, progress.advance)
        if out.suffix == ".safetensors":
            writer.write_file(temporary)
        else:
            writer.write_folder(temporary, options.max_shard_bytes, config)
    get_logger().info(f"wrote {len(specs):,} tensors, {size(total)} to {out} in {progress.seconds:.1f} s")


def diffusers_config(
    settings: Mapping[str, Any], run: Mapping[str, Any], axes_dim: Sequence[int] | None, where: str
) -> dict[str, Any]:
    """The config.json with which FluxTransformer2DModel takes the weights of a model with these settings.

    Args:
        settings: what the weights tell (`infer_settings`). run: what the run that trained them was told, if there is
            one. axes_dim: rotary dimensions, which are in no weights; by default the run's, or the published models'.

    Raises:
        ValueError: FluxTransformer2DModel is not made for such a model, or `axes_dim` is not known.
    """
    obstacles = {
        "its cond_in, which takes reference frames, has no place there": settings["cond_embed"],
        f"its mlp_ratio is {settings['mlp_ratio']:g}, there it is 4": settings["mlp_ratio"] != 4,
        "its q, k, v have no bias, there they have": settings["depth"] and not settings["qkv_bias"],
        f"its theta is {run.get('theta')}, there it is 10000": run.get("theta", 10_000) != 10_000,
    }
    found = [reason for reason, holds in obstacles.items() if holds]
    if found:
        raise ValueError(f"{where} can't be written for diffusers' FluxTransformer2DModel: {'; '.join(found)}")
    head = settings["hidden_size"] // settings["num_heads"]
    axes = tuple(axes_dim or run.get("axes_dim") or FLUX_AXES.get(head, ()))
    if sum(axes) != head:
        raise ValueError(
            f"{where} has heads of {head} dimensions"
            + (f", not {list(axes)} = {sum(axes)}" if axes else "; how rotary divides them is not in the file")
            + ": set --axes-dim to the model's (frame, row, column), e.g. --axes-dim 16 56 56"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": settings["in_channels"],
        "num_layers": settings["depth"],
        "num_single_layers": settings["depth_single_blocks"],
        "attention_head_dim": head,
        "num_attention_heads": settings["num_heads"],
        "joint_attention_dim": settings["context_in_dim"],
        "pooled_projection_dim": settings["vec_in_dim"],
        "guidance_embeds": settings["guidance_embed"],
        "axes_dims_rope": list(axes),
    }


# ------------------------------------------------------------------------------------------------ what is written


def _layout(source: WeightSource, path: Path, given: str | None) -> Layout:
    found, known = source_layout(source, path)
    if given is not None:
        named = layout_of(source.shapes)
        if named is not None and named.naming != LAYOUTS[given].naming:
            raise ValueError(f"{path} is not of layout '{given}': its tensors have the names of '{named.naming}'")
        return LAYOUTS[given]
    if found is None:
        raise ValueError(f"{path} does not hold the weights of an MMDiT (flux, Open-Sora): it has no blocks")
    if not known:
        get_logger().info(f"{path}: taken as {describe(found)}, by its names (--from says otherwise)")
    return found


def _specs(source: WeightSource, conversion: Conversion, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    def dtype_of(name: str) -> torch.dtype:
        return dtype or reduce(torch.promote_types, [source.dtypes[s] for s in conversion.sources([name])])

    shapes = conversion.shapes(source.shapes)
    return {name: TensorSpec(shape, dtype_of(name)) for name, shape in shapes.items()}


class _Reader:
    """Converts tensors one by one in their order; reads what they need in runs."""

    def __init__(self, source: WeightSource, conversion: Conversion, specs: Mapping[str, TensorSpec]):
        self.source, self.conversion, self.specs = source, conversion, specs
        self._run_of = {name: run for run in in_runs(conversion, source, list(specs)) for name in run}
        self._run: list[str] = []
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if self._run_of[name] is not self._run:
            self._run, self._tensors = self._run_of[name], {}  # free the last run's before the next is read
            self._tensors = self.source.read(self.conversion.sources(self._run))
        return self.conversion.tensor(name, self._tensors.__getitem__).to(self.specs[name].dtype)


def _say(path: Path, layout: Layout, specs: Mapping[str, TensorSpec], options: ExportOptions) -> None:
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})
    target = LAYOUTS[options.to]
    change = "as they are" if layout == target else f"from {describe(layout)} to {describe(target)}"
    averages = "averaged weights, which a checkpoint keeps in float32, " if options.ema else ""
    get_logger().info(f"{path}: {averages}written {change}, in {' and '.join(dtypes)}")


@dataclass(frozen=True)
class _Writer:
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    layout: str
    on_bytes: Callable[[int], None]

    def write_file(self, path: Path, names: Sequence[str] | None = None) -> None:
        chosen = {name: self.specs[name] for name in (self.specs if names is None else names)}
        stream_safetensors(path, chosen, self.read, {"format": "pt", "layout": self.layout}, self.on_bytes)

    def write_folder(self, folder: Path, max_shard_bytes: int, config: Mapping[str, Any] | None) -> None:
        """Shards and an index, named as transformers or diffusers names them; total_size is in bytes."""
        stem = DIFFUSERS_NAME if self.layout == "diffusers" else "model"
        shards = group_by_size({name: spec.nbytes for name, spec in self.specs.items()}, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            self.write_file(folder / file, names)
            weight_map.update(dict.fromkeys(names, file))
        total = sum(spec.nbytes for spec in self.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors{INDEX_SUFFIX}", index)
        if config is not None:
            _write_json(folder / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_synced(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


# --------------------------------------------------------------------------------------------------- where it goes


def _check_out(out: Path, force: bool) -> None:
    if out.suffix in (*TORCH_SUFFIXES, ".ckpt", ".json"):
        raise ValueError(f"OUT={out}: weights are written to a .safetensors file or to a folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"OUT={out}: there is no folder {out.parent}: make it first")
    if out.suffix == ".safetensors" and out.is_dir():
        raise FileExistsError(f"OUT={out} is a folder: choose another name")
    if out.suffix != ".safetensors" and out.is_file():
        raise FileExistsError(f"OUT={out} is a file; a folder would take its place: choose another name")
    if out.exists() and not force:
        raise FileExistsError(f"OUT={out} exists: choose another name, or replace it with --force")
    if out.is_dir():
        others = [file.name for file in sorted(out.iterdir()) if not _is_ours(file)]
        if others:
            raise FileExistsError(f"OUT={out} also holds other files ({others[0]}), which --force would remove")


def _is_ours(file: Path) -> bool:
    """Whether a file is of a kind that `write_folder` writes."""
    return file.is_file() and (file.name == "config.json" or file.name.endswith((".safetensors", INDEX_SUFFIX)))


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise ValueError(f"OUT={out} needs {size(needed)}, but its disk has {size(free)} free: make room first")


@contextmanager
def _renamed_when_done(out: Path, force: bool) -> Iterator[Path]:
    """A new file or folder beside `out` to write to; it becomes `out` at the end, or is removed if that is not
    reached."""
    out = out.absolute()
    temporary, old = out.with_name(f".tmp-{out.name}"), out.with_name(f".old-{out.name}")
    if force:
        _remove(temporary)
    try:
        temporary.touch(exist_ok=False) if out.suffix == ".safetensors" else temporary.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{temporary} exists: another process is writing {out}, or one was killed; remove it, or use --force"
        ) from None
    try:
        yield temporary
        if out.is_dir():
            out.rename(old)
        os.replace(temporary, out)
    except OSError as error:
        _remove(temporary)
        raise OSError(f"writing {out} failed, nothing is left of it: {error}") from error
    except BaseException:
        _remove(temporary)
        raise
    _remove(old)
    sync_folder(out.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
