"""The encoders that are only ever used, never trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from opensora.registry import Registry


def build_frozen(
    registry: Registry, settings: Mapping[str, Any], where: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The autoencoder or text encoder of a config's section `where`, in `dtype` on `device`, without gradients."""
    return registry.build(settings, where=where, dtype=dtype, device=device).eval().requires_grad_(False)
