"""What the shapes of a model's weights tell of its settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from opensora.models.misfit import Misfit
from opensora.models.mmdit.model import MMDiT

Shapes = Mapping[str, tuple[int, ...]]

TOLD_BY_WEIGHTS = ("in_channels", "hidden_size", "vec_in_dim", "context_in_dim", "num_heads", "mlp_ratio")


def infer_settings(shapes: Shapes) -> dict[str, Any]:
    """The arguments of `MMDiT` that weights in Open-Sora's layout tell; those that absent tensors would tell are left
    out. `axes_dim`, `theta` and the rotary form are in no shape."""
    found: dict[str, Any] = {
        "depth": _count(shapes, "double_blocks"),
        "depth_single_blocks": _count(shapes, "single_blocks"),
        "guidance_embed": any(name.startswith("guidance_in.") for name in shapes),
        "cond_embed": any(name.startswith("cond_in.") for name in shapes),
        "qkv_bias": any(name.endswith("_attn.q_proj.bias") for name in shapes),
    }
    hidden, found["in_channels"] = _matrix(shapes, "img_in.weight")
    found["hidden_size"] = hidden
    found["vec_in_dim"] = _matrix(shapes, "vector_in.in_layer.weight")[1]
    found["context_in_dim"] = _matrix(shapes, "txt_in.weight")[1]
    head = next((math.prod(shape) for name, shape in shapes.items() if name.endswith(".query_norm.scale")), None)
    if hidden:
        found["num_heads"] = hidden // head if head else None
        found["mlp_ratio"] = _mlp_ratio(shapes, hidden)
    features = _matrix(shapes, "cond_in.weight")[1]
    if features and found["in_channels"]:
        found["patch_size"] = math.isqrt(max(0, features - found["in_channels"]))
    return {name: value for name, value in found.items() if value is not None}


def check_whole(shapes: Shapes, where: str) -> dict[str, Any]:
    """The settings of weights in Open-Sora's layout that are those of a whole model, no more and no less.

    Raises:
        ValueError: tensors are missing, left over or of another shape than the others ask for.
    """
    settings = infer_settings(shapes)
    lacking = [name for name in TOLD_BY_WEIGHTS if not settings.get(name)]
    if lacking:
        raise ValueError(f"{where} does not hold a whole MMDiT (flux, Open-Sora): nothing tells {', '.join(lacking)}")
    head = settings["hidden_size"] // settings["num_heads"]
    free = {"axes_dim": [0, 0, head], "theta": 10_000, "fused_qkv": False, "use_liger_rope": True}
    with torch.device("meta"):
        model = MMDiT(**settings, **free)
    misfit = str(Misfit.between({name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, shapes))
    if misfit:
        raise ValueError(f"{where} does not hold a whole MMDiT (flux, Open-Sora): {misfit}")
    return settings


def _count(shapes: Shapes, blocks: str) -> int:
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _matrix(shapes: Shapes, name: str) -> tuple[int | None, int | None]:
    shape = shapes.get(name, ())
    return shape if len(shape) == 2 else (None, None)


def _mlp_ratio(shapes: Shapes, hidden: int) -> float | None:
    for name, joined in (("double_blocks.0.img_mlp.0.weight", 0), ("single_blocks.0.v_mlp.weight", hidden)):
        rows = _matrix(shapes, name)[0]
        if rows:
            return (rows - joined) / hidden
    return None
