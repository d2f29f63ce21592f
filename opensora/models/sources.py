"""Where weights come from: what `from_pretrained` means, which layout it has, adapters merged into what they adapt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoint_folder import parse_folder_name, resolve_checkpoint
from opensora.models.hub import download_weights
from opensora.models.lora import Adapters, base_of, find_adapters
from opensora.models.mmdit.convert import plan_conversion
from opensora.models.mmdit.layouts import LAYOUTS, Layout, layout_of
from opensora.models.weight_files import WeightSource, open_averages, open_weights
from opensora.settings import is_hub_name


def find_weights(from_pretrained: str | Sequence[str]) -> Path:
    """The file or folder that `from_pretrained` means on this machine, downloaded if it is a name on the Hugging Face
    hub: "owner/repository/file", or "owner/repository" and "owner/repository/folder" with an index or one file."""
    try:
        return resolve_checkpoint(from_pretrained)
    except FileNotFoundError:
        name = str(from_pretrained)
        if not isinstance(from_pretrained, str) or not is_hub_name(name):
            raise
    return download_weights(name)


def download(from_pretrained: str | Sequence[str] | None) -> None:
    """Have what `from_pretrained` names on the Hugging Face hub in the hub's cache; nothing for what is a path here.
    Processes that ask for the same file wait for one of them."""
    if isinstance(from_pretrained, str) and is_hub_name(from_pretrained) and not Path(from_pretrained).exists():
        download_weights(from_pretrained)


def open_model(path: Path, use_ema: bool = False, lora: Path | None = None, lora_scale: float = 1.0) -> WeightSource:
    """The weights of a transformer, with adapters merged into them: those of `lora`, or the checkpoint's own where
    `path` is one of adapters.

    Args:
        path: of `find_weights`. use_ema: the averaged weights, or the averaged adapters where there are adapters.
        lora: a checkpoint of a run with lora_config, or a folder of peft's. lora_scale: multiplies what adapters add.

    Raises:
        FileNotFoundError, ValueError: some of it is not there, is broken, or does not belong together.
    """
    if lora is None and find_adapters(path) is None:
        return open_averages(path) if use_ema else open_weights(path)
    adapters_at, base = (path, base_of(path)) if lora is None else (lora, path)
    if base is None:
        raise FileNotFoundError(
            f"{path} holds adapters, and what they were trained on is not where it was ({Adapters.read(path).base}): "
            f"give it in their place, and the adapters as --lora {path}"
        )
    adapters = Adapters.read(adapters_at, use_ema, lora_scale)
    source = open_model(base)
    layout, _ = source_layout(source, base)
    return adapters.merged(_converted(source, layout, _adapted_layout(adapters, adapters_at, layout)), str(adapters_at))


def _adapted_layout(adapters: Adapters, path: Path, base: Layout | None) -> Layout | None:
    """The layout of the weights that adapters were trained on: their run tells, or their names, or the base."""
    named = layout_of(adapters.pairs)
    return _layout_of_run(path) or (base if named is None or (base and base.naming == named.naming) else named)


def _converted(source: WeightSource, found: Layout | None, target: Layout | None) -> WeightSource:
    """The same weights in another layout."""
    if found is None or target is None or found == target:
        return source
    conversion = plan_conversion(source.shapes, found, target)

    def dtype_of(name: str) -> torch.dtype:
        return reduce(torch.promote_types, [source.dtypes[s] for s in conversion.sources([name])])

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = source.read(conversion.sources(names))
        return {name: conversion.tensor(name, tensors.__getitem__) for name in names}

    name = next(name for name, layout in LAYOUTS.items() if layout == target)
    dtypes = {name: dtype_of(name) for name in conversion.pieces}
    return WeightSource(conversion.shapes(source.shapes), dtypes, read, {**source.metadata, "layout": name})


def source_layout(source: WeightSource, path: Path) -> tuple[Layout | None, bool]:
    """The layout of weights, and whether that is known: None if the names don't tell.

    A file that was converted is marked, a checkpoint has its run's config. The rotary form of other files is that of
    the published ones with such names.
    """
    marked = LAYOUTS.get(source.metadata.get("layout", ""))
    named = layout_of(source.shapes)
    if marked is None and named is not None:
        marked = _layout_of_run(path)
    if marked is not None and named is not None and marked.naming == named.naming:
        return marked, True
    return named, False


def run_settings(path: Path) -> dict[str, Any]:
    """The `model` settings that a checkpoint was trained with; none for other paths or without a config.txt."""
    if parse_folder_name(path) is None:
        return {}
    for folder in (path, path.parent):
        try:
            return json.loads((folder / "config.txt").read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _layout_of_run(path: Path) -> Layout | None:
    settings = run_settings(path)
    if not settings:
        return None
    naming = "flux" if settings.get("fused_qkv", True) else "open-sora"
    return Layout(naming, interleaved=not settings.get("use_liger_rope", False))
