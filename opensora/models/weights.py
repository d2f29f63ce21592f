"""A model from its settings: built without memory, then loaded from where `from_pretrained` says, or initialised."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoint_folder import resolve_checkpoint
from opensora.common import get_logger
from opensora.models.mmdit import MMDiT
from opensora.models.mmdit.convert import Conversion, Layout, layout_of, plan_conversion
from opensora.models.mmdit.initialise import init_weights
from opensora.models.weight_files import (
    WeightSource,
    open_averages,
    open_weights,
    plan_shards,
    save_shard,
    write_index,
)
from opensora.registry import MODELS
from opensora.settings import ModelBuilding, is_hub_name

__all__ = ["build_model", "load_weights", "plan_shards", "save_shard", "write_index"]

# Settings of a config's `model` that are the builder's or the trainer's, not the module's.
BUILDING = tuple(field.name for field in dataclasses.fields(ModelBuilding))

# Embedders that some models of the family have and others don't: such weights may be absent or left over.
MAY_BE_UNEXPECTED = ("cond_in.", "guidance_in.")
MAY_BE_MISSING = ("cond_in.",)

READ_ELEMENTS = 2**28  # averages are read in parts of about 1 GiB: they are not mapped


def build_model(
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    use_ema: bool = False,
    where: str = "model",
) -> MMDiT:
    """The model of a config's `model` settings, in `dtype` on `device`.

    Without `from_pretrained` the weights are drawn from torch's default generator: seed it for the same ones on every
    rank. With it they are copied from mapped files straight to where they belong. `strict_load` is accepted and
    changes nothing: what may be missing or left over is the same for all (`load_weights`).

    Args:
        use_ema: load the averaged weights of the checkpoint that `from_pretrained` names.
        where: the settings' place in the config, for messages.

    Raises:
        FileNotFoundError: `from_pretrained` is nowhere. ValueError: a wrong setting, or weights that don't fit.
    """
    module_settings = {key: value for key, value in settings.items() if key not in BUILDING}
    from_pretrained = settings.get("from_pretrained")
    if use_ema and not from_pretrained:
        raise ValueError(f"use_ema=True needs a checkpoint: set --{where}.from-pretrained outputs/EXP")
    with torch.device("meta"):
        model = MODELS.build(module_settings, where=where).to(dtype)
    if not from_pretrained:
        init_weights(model.to_empty(device=device))
        return model
    path = find_weights(from_pretrained)
    load_weights(model, open_averages(path) if use_ema else open_weights(path), str(path), device)
    return model


def find_weights(from_pretrained: str | Sequence[str]) -> Path:
    """The file or folder that `from_pretrained` means: on this machine, or "owner/repository/file" of the Hugging Face
    hub, downloaded."""
    try:
        return resolve_checkpoint(from_pretrained)
    except FileNotFoundError:
        name = str(from_pretrained)
        if not is_hub_name(name) or name.count("/") < 2:
            raise
    from huggingface_hub import hf_hub_download

    owner, repository, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # the hub's errors have no base class in common over its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name} is no file or folder here, and the Hugging Face hub did not give it ({reason})"
        ) from error


@torch.no_grad()
def load_weights(model: MMDiT, source: WeightSource, where: str, device: torch.device | str) -> None:
    """Give a model on the meta device its memory on `device`, and its weights from `source`, converted to its layout.

    `cond_in` and `guidance_in` may be left over and `cond_in` may be missing (it is set to zero): both are said.

    Raises:
        ValueError: any other weights are missing or left over, or have another shape; nothing was allocated.
    """
    conversion = _conversion(model, source, where)
    _check_fit(model, source, conversion, where)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for names in _parts(conversion, source, [name for name in parameters if name in conversion.pieces]):
        tensors = source.read(list(dict.fromkeys(s for name in names for s in conversion.sources(name))))
        for name in names:
            parameters[name].copy_(conversion.tensor(name, tensors.__getitem__))
    for name in parameters.keys() - conversion.pieces.keys():
        parameters[name].zero_()


def _conversion(model: MMDiT, source: WeightSource, where: str) -> Conversion:
    """From the layout that the files have to the model's. Files with the model's own names are taken as they are."""
    target = Layout(model.fused_qkv, model.interleaved)
    found = layout_of(source.shapes) or target
    if found.fused_qkv == target.fused_qkv:
        if found != target:
            form = "interleaved" if target.interleaved else "rotate-half"
            get_logger().warning(f"{where}: its q and k are taken as {form}, as the model's use_liger_rope says")
        return plan_conversion(source.shapes, target, target)
    get_logger().info(f"{where}: converting {_describe(found)} to {_describe(target)}")
    return plan_conversion(source.shapes, found, target)


def _describe(layout: Layout) -> str:
    rotary = "interleaved" if layout.interleaved else "rotate-half"
    return f"{'fused' if layout.fused_qkv else 'split'} qkv with {rotary} rotary"


def _check_fit(model: MMDiT, source: WeightSource, conversion: Conversion, where: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = {name: conversion.shape(name, source.shapes) for name in conversion.pieces}
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshaped = [
        f"{name} {list(given[name])} instead of {list(expected[name])}"
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    zeroed, missing = _divide(missing, MAY_BE_MISSING)
    dropped, unexpected = _divide(unexpected, MAY_BE_UNEXPECTED)
    wrong = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    problems = [f"{len(names)} {kind} ({_first(names)})" for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(
            f"from_pretrained: {where} does not fit the model: {', '.join(problems)}; set the model's settings "
            "(depth, hidden_size, guidance_embed, ...) to those of the weights"
        )
    if zeroed:
        get_logger().info(f"{where}: has no {_first(zeroed)}: set to zero")
    if dropped:
        get_logger().info(f"{where}: {_first(dropped)}: not in the model, left out")


def _divide(names: Sequence[str], prefixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names that start with one of the prefixes, and the others."""
    return [n for n in names if n.startswith(prefixes)], [n for n in names if not n.startswith(prefixes)]


def _first(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _parts(conversion: Conversion, source: WeightSource, names: Sequence[str]) -> Iterator[list[str]]:
    """The names in runs of about READ_ELEMENTS elements."""
    part: list[str] = []
    elements = 0
    for name in names:
        part.append(name)
        elements += torch.Size(conversion.shape(name, source.shapes)).numel()
        if elements >= READ_ELEMENTS:
            yield part
            part, elements = [], 0
    if part:
        yield part
