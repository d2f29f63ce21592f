"""The optimizer that `optim.cls` names, and the learning rate of each update."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from opensora.common import get_logger
from opensora.registry import Registry, nearest

# ColossalAI's own Adams need a CUDA toolchain to compile at first use, and have no CPU kernel; torch's fused AdamW
# computes the same update.
FUSED_ADAMW_NAMES = ("HybridAdam", "CPUAdam", "FusedAdam")

# ZeRO gives a rank a flat part of every parameter, and the optimizer sees nothing but that part.
WHY_NOT_WITH_ZERO = {
    "Adafactor": "scales an update by the norm of its whole parameter",
    "LAMB": "scales an update by norms of its whole parameter",
    "LARS": "scales an update by norms of its whole parameter",
    "LBFGS": "computes the loss several times in one update",
    "Muon": "orthogonalises whole matrices",
    "SparseAdam": "takes sparse gradients only",
}

TORCH_NAMES = tuple(
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type) and name not in ("Optimizer", *WHY_NOT_WITH_ZERO)
)

# Those of bitsandbytes that torch has not: moments of 8 bits, or paged out to host memory when GPU memory is full.
BITSANDBYTES_NAMES = tuple(
    name
    for kind in ("Adam", "AdamW", "AdEMAMix", "Lion")
    for name in (kind, f"{kind}8bit", f"Paged{kind}", f"Paged{kind}8bit")
    if name not in TORCH_NAMES
)


class OptimizerRegistry(Registry):
    """Optimizers by the name that `optim.cls` gives; those of bitsandbytes are imported when one is asked for."""

    def __init__(self):
        super().__init__("optimizer", supplied=("params",))

    def names(self) -> list[str]:
        return sorted({*FUSED_ADAMW_NAMES, *TORCH_NAMES, *BITSANDBYTES_NAMES, *WHY_NOT_WITH_ZERO})

    def get(self, name: str) -> type[torch.optim.Optimizer]:
        return optimizer_class(name)

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        found = super().parameters(name)
        decay = found.get("weight_decay")
        if decay is not None and decay.annotation is decay.empty:  # bitsandbytes writes its default as 0
            found["weight_decay"] = decay.replace(default=float(decay.default))
        return found


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer that `optim.cls` means.

    Raises:
        ValueError: there is none of this name, it can't work on ZeRO's shards, or its package is not installed.
    """
    if name in FUSED_ADAMW_NAMES:
        return torch.optim.AdamW
    if name in TORCH_NAMES:
        return getattr(torch.optim, name)
    if name in BITSANDBYTES_NAMES:
        return _of_bitsandbytes(name)
    if name in WHY_NOT_WITH_ZERO:
        raise ValueError(
            f"optim.cls='{name}' {WHY_NOT_WITH_ZERO[name]}, and ZeRO gives it flat parts of parameters: "
            "set --optim.cls AdamW"
        )
    known = (*FUSED_ADAMW_NAMES, *TORCH_NAMES, *BITSANDBYTES_NAMES)
    raise ValueError(f"optim.cls='{name}' is unknown{nearest(name, known)}")


def _of_bitsandbytes(name: str) -> type[torch.optim.Optimizer]:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            f"optim.cls='{name}' needs the package bitsandbytes: pip install bitsandbytes, or set --optim.cls AdamW"
        ) from None
    if not hasattr(bitsandbytes.optim, name):
        raise ValueError(
            f"optim.cls='{name}' is not in bitsandbytes {bitsandbytes.__version__}: upgrade it, or set --optim.cls "
            "AdamW"
        )
    return getattr(bitsandbytes.optim, name)


def takes_weight_decay(name: str) -> bool:
    return "weight_decay" in inspect.signature(optimizer_class(name)).parameters


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of `optim=dict(cls=..., lr=..., ...)` over the trained parameters.

    With `no_decay_norms_and_biases`, vectors (scales of norms, biases) are a group of their own whose weight decay is
    0. ZeRO reduces the gradients of each group apart, so the setting costs more and smaller reductions.
    """
    cls = optimizer_class(settings["cls"])
    takes = inspect.signature(cls).parameters  # what else a config may hold is accepted and does nothing
    arguments = {key: value for key, value in settings.items() if key in takes}
    if cls is torch.optim.AdamW and not (arguments.get("foreach") or arguments.get("differentiable")):
        arguments.setdefault("fused", True)
    if settings["cls"] in FUSED_ADAMW_NAMES:
        get_logger().info(f"optim.cls='{settings['cls']}' is torch's fused AdamW: the same update, nothing to compile")
    trained = [p for p in parameters if p.requires_grad]
    if settings.get("no_decay_norms_and_biases") and settings.get("weight_decay") != 0:
        return cls(_decayed_apart(trained), **arguments)
    return cls(trained, **arguments)


def _decayed_apart(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class LearningRate:
    """The learning rate as a function of the updates done: nothing to save, nothing to restore.

    Warm-up is linear, update u of w: initial + (u + 1) / (w + 1) * (lr - initial). After it the rate is constant, or
    with `cosine` falls to 0 at update `total`: lr / 2 * (1 + cos(pi * (u - w) / (total - w))).
    """

    def __init__(
        self, lr: float, warmup: int | None = None, cosine: bool = False, total: int = 0, initial: float = 1e-6
    ):
        self.lr, self.warmup, self.cosine, self.total, self.initial = lr, warmup or 0, cosine, total, initial

    def __call__(self, update: int) -> float:
        if update < self.warmup:
            return self.initial + (update + 1) / (self.warmup + 1) * (self.lr - self.initial)
        if not self.cosine:
            return self.lr
        done = (update - self.warmup) / max(1, self.total - self.warmup)
        return self.lr / 2 * (1 + math.cos(math.pi * min(1.0, done)))
