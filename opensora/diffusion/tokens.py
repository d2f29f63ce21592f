"""Latent videos as token sequences and back, and where each token sits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, T * H/p * W/p, C * p * p]: tokens by (t, h, w), features by (channel, row, column)."""
    batch, channels, frames, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, frames, height // p, p, width // p, p)
    x = x.permute(0, 2, 3, 5, 1, 4, 6)  # [B, T, H/p, W/p, C, p, p]
    return x.reshape(batch, frames * (height // p) * (width // p), channels * p * p)


def unpack(tokens: Tensor, latent_size: tuple[int, int, int], patch_size: int) -> Tensor:
    """The inverse of `pack`: [B, L, C * p * p] -> [B, C, T, H, W] for latents of size (T, H, W)."""
    frames, height, width = latent_size
    batch, _, features = tokens.shape
    p = patch_size
    x = tokens.reshape(batch, frames, height // p, width // p, features // (p * p), p, p)
    x = x.permute(0, 4, 1, 2, 5, 3, 6)  # [B, C, T, H/p, p, W/p, p]
    return x.reshape(batch, features // (p * p), frames, height, width)


def position_ids(
    batch: int, latent_size: tuple[int, int, int], patch_size: int, device: torch.device | str | None = None
) -> Tensor:
    """(frame, row, column) of every token of `pack`'s sequence. [B, L, 3] fp32, one storage for the whole batch."""
    frames, height, width = latent_size
    axes = (frames, height // patch_size, width // patch_size)
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in axes), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(1, -1, 3).expand(batch, -1, -1)  # [B, L, 3]


def text_position_ids(batch: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """Text has no place in space or time: zeros [B, S, 3] fp32."""
    return torch.zeros(1, 1, 3, device=device).expand(batch, length, 3)
