"""A model from its settings: built without memory, then loaded from where `from_pretrained` says, or initialised."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.common import get_logger
from opensora.models.attention import select_attention
from opensora.models.byte_progress import ByteProgress, size
from opensora.models.misfit import Misfit, first_names
from opensora.models.mmdit import MMDiT
from opensora.models.mmdit.convert import Conversion, plan_conversion
from opensora.models.mmdit.infer import infer_settings
from opensora.models.mmdit.initialise import init_weights
from opensora.models.mmdit.layouts import OPEN_SORA, Layout, describe
from opensora.models.sources import find_weights, open_model, source_layout
from opensora.models.weight_files import WeightSource
from opensora.registry import MODELS
from opensora.settings import ModelBuilding

# Settings of a config's `model` that are the builder's or the trainer's, not the module's.
BUILDING = tuple(field.name for field in dataclasses.fields(ModelBuilding))

# Embedders that some models of the family have and others don't: such weights may be absent or left over.
MAY_BE_UNEXPECTED = ("cond_in.", "guidance_in.")
MAY_BE_MISSING = ("cond_in.",)

READ_BYTES = 2**28  # of tensors read at a time: averages are not mapped, and each reading of them takes a while


def build_model(
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    use_ema: bool = False,
    where: str = "model",
    lora: Path | None = None,
    lora_scale: float = 1.0,
) -> MMDiT:
    """The model of a config's `model` settings, in `dtype` on `device`.

    Without `from_pretrained` the weights are drawn from torch's default generator: seed it for the same ones on every
    rank. With it they are copied from mapped files straight to where they belong. `strict_load` is accepted and
    changes nothing: what may be missing or left over is the same for all (`load_weights`).

    Args:
        use_ema: load the averaged weights of the checkpoint that `from_pretrained` names.
        where: the settings' place in the config, for messages.
        lora, lora_scale: adapters to merge into the weights, and how strongly (`open_model`).

    Raises:
        FileNotFoundError: `from_pretrained` is nowhere. ValueError: a wrong setting, or weights that don't fit.
    """
    module_settings = {key: value for key, value in settings.items() if key not in BUILDING}
    from_pretrained = settings.get("from_pretrained")
    if use_ema and not from_pretrained:
        raise ValueError(f"use_ema=True needs a checkpoint: set --{where}.from-pretrained outputs/EXP")
    with torch.device("meta"):
        model = MODELS.build(module_settings, where=where).to(dtype)
    select_attention(model, settings.get("attention", "sdpa"), where)
    if not from_pretrained:
        allocate(model, device)
        init_weights(model)
        return model
    path = find_weights(from_pretrained)
    load_weights(model, open_model(path, use_ema, lora, lora_scale), path, device, where)
    return model


@torch.no_grad()
def load_weights(
    model: MMDiT, source: WeightSource, path: Path, device: torch.device | str, where: str = "model"
) -> None:
    """Give a model on the meta device its memory on `device`, and its weights from `source`, converted to its layout.

    `cond_in` and `guidance_in` may be left over and `cond_in` may be missing (it is set to zero): both are said.

    Args:
        path: what `source` was opened from. where: the model's place in the config, for messages.

    Raises:
        ValueError: any other weights are missing, left over, of another shape or no floats; nothing was allocated.
    """
    conversion = _conversion(model, source, path)
    _check_fit(model, source, conversion, f"{where}.from_pretrained: {path}")
    allocate(model, device)
    parameters = dict(model.named_parameters())
    loaded = [name for name in parameters if name in conversion.pieces]
    used = conversion.sources(loaded)
    _report_casts(source, used, model, path)
    with ByteProgress(f"loading {path}", sum(parameters[name].nbytes for name in loaded)) as progress:
        for names in in_runs(conversion, source, loaded):
            tensors = source.read(conversion.sources(names))
            for name in names:
                parameters[name].copy_(conversion.tensor(name, tensors.__getitem__))
                progress.advance(parameters[name].nbytes)
    for name in parameters.keys() - conversion.pieces.keys():
        parameters[name].zero_()
    count, read = sum(parameters[name].numel() for name in loaded), sum(map(source.nbytes, used))
    get_logger().info(
        f"loaded {len(used):,} tensors, {_count(count)} parameters, {size(read)} from {path} in "
        f"{progress.seconds:.1f} s"
    )


def in_runs(conversion: Conversion, source: WeightSource, names: Sequence[str]) -> Iterator[list[str]]:
    """Target names in runs that need about READ_BYTES of the source, whole tensors each."""
    run: list[str] = []
    needed: set[str] = set()
    for name in names:
        run.append(name)
        needed.update(conversion.sources([name]))
        if sum(map(source.nbytes, needed)) >= READ_BYTES:
            yield run
            run, needed = [], set()
    if run:
        yield run


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give the parameters of a model on the meta device memory, uninitialised. (`to_empty` imports torch's symbolic
    shapes for it, which takes longer than reading gigabytes.)"""
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        setattr(model.get_submodule(module), leaf, nn.Parameter(memory, parameter.requires_grad))


def _conversion(model: MMDiT, source: WeightSource, path: Path) -> Conversion:
    """From the layout that the files have to the model's. Files with the model's own names are taken to have its
    rotary form too, unless it is known that they don't."""
    target = Layout("flux" if model.fused_qkv else "open-sora", model.interleaved)
    found, known = source_layout(source, path)
    if found is not None and not known and found.naming == target.naming:
        if found != target:
            form = "interleaved" if target.interleaved else "rotate-half"
            get_logger().warning(f"{path}: its q and k are taken as {form}, as the model's use_liger_rope says")
        found = target
    found = found or target
    if found != target:
        get_logger().info(f"{path}: converting {describe(found)} to {describe(target)}")
    return plan_conversion(source.shapes, found, target)


def _check_fit(model: MMDiT, source: WeightSource, conversion: Conversion, where: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = conversion.shapes(source.shapes)
    misfit = Misfit.between(expected, given)
    zeroed, misfit.missing = _divide(misfit.missing, MAY_BE_MISSING)
    dropped, misfit.unexpected = _divide(misfit.unexpected, MAY_BE_UNEXPECTED)
    if str(misfit):
        raise ValueError(f"{where} does not fit the model: {misfit}{_remedy(model, given, expected)}")
    used = conversion.sources(name for name in expected if name in given)
    quantised = [name for name in used if not source.dtypes[name].is_floating_point]
    if quantised:
        raise ValueError(
            f"{where} holds {len(quantised)} tensors that are no floats ({first_names(quantised)}): give weights in "
            "bf16, fp16 or fp32, not quantised ones"
        )
    if zeroed:
        get_logger().info(f"{where} has no {first_names(zeroed)}: set to zero")
    if dropped:
        get_logger().info(f"{where}: {first_names(dropped)}: not in the model, left out")


def _remedy(model: MMDiT, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Which settings of the model the weights are not for, as far as shapes tell."""
    layout = Layout("flux" if model.fused_qkv else "open-sora", model.interleaved)
    weights, own = (
        infer_settings(plan_conversion(shapes, layout, OPEN_SORA).shapes(shapes)) for shapes in (given, expected)
    )
    others = [f"{name}={value!r}" for name, value in weights.items() if name in own and own[name] != value]
    return f"; the weights are of a model with {', '.join(others)}" if others else ""


def _report_casts(source: WeightSource, names: Sequence[str], model: MMDiT, path: Path) -> None:
    target = next(model.parameters()).dtype
    for dtype, count in Counter(source.dtypes[name] for name in names).items():
        if dtype != target:
            get_logger().info(f"{path}: {count:,} tensors in {_short(dtype)} are cast to {_short(target)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"


def _divide(names: Sequence[str], prefixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The names that start with one of the prefixes, and the others."""
    return [n for n in names if n.startswith(prefixes)], [n for n in names if not n.startswith(prefixes)]
