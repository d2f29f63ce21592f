"""What the blocks of the MMDiT are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # of all norms


def timestep_embedding(t: Tensor, dim: int = 256, time_factor: float = 1000.0, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of t in [0, 1]: [B] -> [B, dim], cosines first, in t's dtype.

    t is scaled in its own dtype, the angles are fp32 and the result is cast back: weights trained with bf16 timesteps
    have seen exactly this double rounding.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (t * time_factor)[:, None].float() * frequencies  # [B, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The layer norm without weights of its own: x [B, L, hidden], shift and scale [B, 1, hidden] -> [B, L, hidden]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), 1 + scale)


class MLPEmbedder(nn.Module):
    """A vector -> the hidden size, through one SiLU layer."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension; the norm is computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, EPSILON)


class QKNorm(nn.Module):
    """RMS norms of queries and keys over the head dimension."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """The conditioning vector [B, hidden] -> `count` parts [B, 1, hidden]: shift, scale, gate of each branch."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, count * hidden_size)
        self.count = count

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)
