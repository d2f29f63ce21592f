"""Tensor parallelism: the ranks of a group hold a part of each block's heads and of its MLP's features.

The layers into attention and MLP are divided by output ("column"), those out of them by input ("row"), as in
Megatron-LM (arXiv:1909.08053): a block communicates twice, with tokens of the full width. Embedders, modulations and
norms are whole on every rank. A linear layer that holds several things side by side (q, k, v; attended values and the
MLP's) is divided in each of these segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.mmdit.blocks import DoubleStreamBlock, SingleStreamBlock, StreamAttention
from opensora.models.mmdit.layers import QKNorm
from opensora.parallel.collectives import enter_split, leave_split, sum_over
from opensora.parallel.context import RankGroup
from opensora.parallel.split import Split


def split_layers(model: nn.Module, group: RankGroup) -> dict[str, Split]:
    """Keep this rank's part of the blocks' layers and adapters, and let the ranks of `group` compute together.

    Call it when weights and adapters have been loaded, before the optimizer is made.

    Args:
        model: an MMDiT, or one with peft's adapters.

    Returns:
        The splits by the parameters' names in `model`; those not in it are whole on every rank.
    """
    if group.size == 1:
        return {}
    enter = torch.compiler.disable(partial(enter_split, group=group))  # a graph can't wait for other ranks
    leave = torch.compiler.disable(partial(leave_split, group=group))
    splits = {}
    for prefix, module in list(model.named_modules()):
        for name, dim, segments in _layers_to_split(module):
            layer = module.get_submodule(name)
            for parameter, split in _split_layer(layer, Split(dim, segments, group.rank, group.size), group).items():
                splits[f"{prefix}.{name}.{parameter}"] = split
            if dim == 1:
                _leave_after(layer, leave)
        _share(module, enter, group)
    return splits


def _layers_to_split(module: nn.Module) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(name, dimension, its segments) of the linear layers that one module holds; weights are [out, in]."""
    if isinstance(module, StreamAttention):
        hidden = module.proj.in_features
        into = [("qkv", 3)] if module.fused_qkv else [("q_proj", 1), ("k_proj", 1), ("v_proj", 1)]
        yield from ((name, 0, (hidden,) * count) for name, count in into)
        yield "proj", 1, (hidden,)
    elif isinstance(module, DoubleStreamBlock):
        for name, mlp in (("img_mlp", module.img_mlp), ("txt_mlp", module.txt_mlp)):
            yield f"{name}.0", 0, (mlp[0].out_features,)
            yield f"{name}.2", 1, (mlp[2].in_features,)
    elif isinstance(module, SingleStreamBlock):
        hidden, mlp = module.hidden_size, module.mlp_size
        if module.fused_qkv:
            yield "linear1", 0, (hidden, hidden, hidden, mlp)
        else:
            yield from (("q_proj", 0, (hidden,)), ("k_proj", 0, (hidden,)), ("v_mlp", 0, (hidden, mlp)))
        yield "linear2", 1, (hidden, mlp)


def _split_layer(layer: nn.Module, split: Split, group: RankGroup) -> dict[str, Split]:
    """Keep this rank's part of a linear layer's weights, and of its adapter's (x -> B A x): along the outputs B is
    divided as the weight is, along the inputs A; the other is whole, and each rank sees a part of its gradient."""
    splits = {}
    divided, whole = ("lora_B", "lora_A") if split.dim == 0 else ("lora_A", "lora_B")
    for name, parameter in list(layer.named_parameters()):
        if whole in name:
            sum_gradient(parameter, group)
        elif divided in name or split.dim == 0 or not name.endswith("bias"):
            _replace_parameter(layer, name, split.take(parameter.detach()), parameter.requires_grad)
            splits[name] = split
    for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
        linear.out_features, linear.in_features = linear.weight.shape
    return splits


def _replace_parameter(layer: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad)
    parameter.dist_layout = "tensor parallel"  # by which ColossalAI knows whose gradient norms to add up
    setattr(layer.get_submodule(owner), leaf, parameter)


def sum_gradient(parameter: nn.Parameter, group: RankGroup) -> None:
    """Sum the gradient of a parameter that is whole on every rank but used with a part of the features."""
    if parameter.requires_grad:
        parameter.register_hook(partial(sum_over, group=group))


def _leave_after(layer: nn.Module, leave: Callable[[Tensor], Tensor]) -> None:
    """Sum a layer's outputs over the ranks, then add the bias once. It is the outermost module's hook, since an adapter
    adds to the same sum."""
    linear = getattr(layer, "base_layer", layer)  # within an adapter
    linear.forward = lambda x: F.linear(x, linear.weight)  # on the instance: parameters keep their names
    layer.register_forward_hook(lambda _, inputs, out: leave(out) + linear.bias)


def _share(module: nn.Module, enter: Callable[[Tensor], Tensor], group: RankGroup) -> None:
    """Let a module of the blocks work with this rank's heads and features."""
    if isinstance(module, StreamAttention):
        module.num_heads //= group.size
        module.heads = partial(_enter_then, enter, module.heads)
    elif isinstance(module, SingleStreamBlock):
        module.num_heads //= group.size
        module.hidden_size //= group.size
        module.mlp_size //= group.size
        module.heads_and_mlp = partial(_enter_then, enter, module.heads_and_mlp)
    elif isinstance(module, DoubleStreamBlock):
        for mlp in (module.img_mlp, module.txt_mlp):
            mlp.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0]),))
    elif isinstance(module, QKNorm):
        for scale in module.parameters():
            sum_gradient(scale, group)


def _enter_then(enter: Callable[[Tensor], Tensor], run: Callable[[Tensor], Any], x: Tensor) -> Any:
    return run(enter(x))
