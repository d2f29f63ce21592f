"""Rotary position embedding over several axes (frame, row, column), in the two forms that weights exist for.

A head's D/2 rotation planes are dealt out to the axes: the first axes_dim[0]/2 turn with the frame index, and so on.
The forms differ in which two entries of a head span plane d: (2d, 2d+1) in flux's weights ("interleaved"), (d, D/2+d)
in Open-Sora's ("rotate half"). `convert.py` permutes weights between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosine and sine of every position's angles, fp32 [B, L, 1, D/2]: computed once, used by all blocks."""

    cos: Tensor
    sin: Tensor


def rotary_table(ids: Tensor, axes_dim: Sequence[int], theta: float, dtype: torch.dtype) -> RotaryTable:
    """The table for position ids [B, L, axes]: angle = id * theta^(-2i/dim), computed in `dtype`, kept in fp32."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim)  # [dim/2]
        angles.append(ids[..., axis, None].to(dtype) * frequencies)  # [B, L, dim/2]
    angle = torch.cat(angles, dim=-1).unsqueeze(2)  # [B, L, 1, D/2]
    return RotaryTable(angle.cos().float(), angle.sin().float())


def rotate_half(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn heads [B, L, H, D] in planes (d, D/2+d), in fp32; the result has the dtype of x."""
    a, b = x.float().chunk(2, dim=-1)  # [B, L, H, D/2] each
    return torch.cat(_turn(a, b, table), dim=-1).to(x.dtype)


def rotate_interleaved(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn heads [B, L, H, D] in planes (2d, 2d+1), in fp32; the result has the dtype of x."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, H, D/2] each
    return torch.stack(_turn(a, b, table), dim=-1).flatten(-2).to(x.dtype)


def _turn(a: Tensor, b: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
    return torch.addcmul(a * table.cos, b, table.sin, value=-1), torch.addcmul(b * table.cos, a, table.sin)
