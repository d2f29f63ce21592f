"""Autoencoders of the diffusers library: built without memory, then loaded, or initialised at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from opensora.common import get_logger
from opensora.models.misfit import Misfit
from opensora.models.sources import find_weights
from opensora.models.weight_files import WeightSource, open_weights

Module = TypeVar("Module", bound=nn.Module)


def build_loaded(
    make: Callable[[], Module],
    from_pretrained: str | None,
    name: str,
    dtype: torch.dtype,
    device: torch.device | str,
    rename: Callable[[WeightSource], WeightSource] = lambda source: source,
) -> Module:
    """What `make` builds, in `dtype` on `device`, with the weights that `from_pretrained` names.

    They go from the mapped file straight to where they belong. None: random weights, the same in every process.

    Args:
        name: the component's, for messages.
        rename: gives the file's tensors the module's names and shapes.

    Raises:
        FileNotFoundError: `from_pretrained` is nowhere. ValueError: it is no file of weights, or they don't fit.
    """
    if from_pretrained is None:
        get_logger().info(f"{name}: from_pretrained is not set, so its weights are random: latents mean nothing")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return _cast(make(), dtype).to(device)
    path = find_weights(from_pretrained)
    source = rename(open_weights(path))
    with torch.device("meta"):
        module = _cast(make(), dtype)
    _check_fit(module, source, str(path), name)
    _copy(module.to_empty(device=device), source)
    return module


def _cast(module: Module, dtype: torch.dtype) -> Module:
    """diffusers' own `to(dtype)` warns of modules that stay in fp32, also where there are none."""
    return nn.Module.to(module, dtype)


@torch.no_grad()
def _copy(module: nn.Module, source: WeightSource) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(source.read([name])[name])


def _check_fit(module: nn.Module, source: WeightSource, where: str, name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    problems = str(Misfit.between(expected, source.shapes))
    if problems:
        raise ValueError(
            f"from_pretrained: {where} does not fit {name}: {problems}; give the weights of such an autoencoder, or "
            "set its channels and layers to those of the weights"
        )
