"""The optimizer that `optim.cls` names, and the learning rate of each update."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from opensora.common import get_logger
from opensora.registry import nearest

# ColossalAI's own Adams need a CUDA toolchain to compile at first use, and have no CPU kernel; torch's fused AdamW
# computes the same update.
FUSED_ADAMW_NAMES = ("HybridAdam", "CPUAdam", "FusedAdam")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The torch optimizer that `optim.cls` means."""
    if name in FUSED_ADAMW_NAMES:
        return torch.optim.AdamW
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = [
            n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
        ]
        raise ValueError(f"optim.cls='{name}' is unknown{nearest(name, [*FUSED_ADAMW_NAMES, *known])}")
    return found


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of `optim=dict(cls=..., lr=..., ...)` over the trained parameters."""
    cls = optimizer_class(settings["cls"])
    takes = inspect.signature(cls).parameters  # what else a config may hold is accepted and does nothing
    arguments = {key: value for key, value in settings.items() if key in takes}
    if cls is torch.optim.AdamW:
        arguments.setdefault("fused", True)
    if settings["cls"] in FUSED_ADAMW_NAMES:
        get_logger().info(f"optim.cls='{settings['cls']}' is torch's fused AdamW: the same update, nothing to compile")
    return cls([p for p in parameters if p.requires_grad], **arguments)


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
