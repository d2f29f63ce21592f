"""Where on the path from data to noise to train and to sample: times t in [0, 1], shifted by size (spec 5.1, 10).

More pixels and more frames hide more noise, so larger videos spend more time near t = 1. The shift is
alpha = (1 at 256 tokens per frame, linearly to 3 at 4096) * sqrt(latent frames), t -> alpha * t / (1 + (alpha - 1) * t)
(Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2, with flux's linear estimate).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What the training shift calls a token: 2 x 2 latents, whatever the model's patch size (spec 5.1).
LATENTS_PER_TOKEN = 4


def linear_by_tokens(num_tokens: float, x1: float = 256, y1: float = 1, x2: float = 4096, y2: float = 3) -> float:
    """The line through (x1, y1) and (x2, y2) at `num_tokens` tokens per frame, not clamped."""
    slope = (y2 - y1) / (x2 - x1)
    return slope * num_tokens + (y1 - slope * x1)


def shift_alpha(tokens_per_frame: int, num_frames: int) -> float:
    """The shift of a video with `num_frames` *latent* frames."""
    return linear_by_tokens(tokens_per_frame) * math.sqrt(num_frames)


def training_shift_alpha(latent_size: tuple[int, int, int]) -> float:
    """The shift that training uses for latents of size (T, H, W)."""
    frames, height, width = latent_size
    return shift_alpha(height * width // LATENTS_PER_TOKEN, frames)


def time_shift(alpha: float, t: Tensor) -> Tensor:
    """t in [0, 1] moved towards 1 for alpha > 1; 0 and 1 stay."""
    return alpha * t / (1 + (alpha - 1) * t)


def training_timesteps(normal: Tensor, latent_size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """[B] standard normal draws (fp32) -> [B] times t of logit-normal density, shifted, rounded to `dtype`."""
    return time_shift(training_shift_alpha(latent_size), torch.sigmoid(normal)).to(dtype)


def sampling_schedule(
    num_steps: int, image_seq_len: int, num_frames: int, shift: bool = True, alpha: float | None = None
) -> list[float]:
    """`num_steps` + 1 times from 1 (noise) to 0 (data), both exact.

    image_seq_len: tokens per latent frame; num_frames: latent frames; alpha replaces the shift estimated from them.
    """
    t = torch.linspace(1, 0, num_steps + 1)
    if shift:
        t = time_shift(shift_alpha(image_seq_len, num_frames) if alpha is None else alpha, t)
    return t.tolist()
