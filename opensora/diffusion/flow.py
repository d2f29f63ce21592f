"""Rectified flow between data (t = 0) and noise (t = 1): interpolation, velocity target, loss (spec 5.2).

With r = 1 - t the path is x_t = r * data + (1 - (1 - SIGMA_MIN) * r) * noise, whose derivative by t is the target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SIGMA_MIN = 1e-5


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point x_t of the path, in the dtype of its inputs.

    data, noise: [B, ...] of one shape and dtype; t: [B] in [0, 1], of the same dtype (bf16 training rounds t first,
    so that the model is told exactly the t that the data was mixed with).
    """
    r = (1 - t).view(-1, *[1] * (data.dim() - 1))  # [B, 1, ...]
    return r * data + (1 - (1 - SIGMA_MIN) * r) * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """d x_t / dt = (1 - SIGMA_MIN) * noise - data; the same for every t. [B, ...] -> [B, ...]"""
    return (1 - SIGMA_MIN) * noise - data


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in fp32 over all elements, tokens of conditioned frames included. Scalar."""
    return F.mse_loss(prediction.float(), target.float())


def euler_step(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """One step of the sampler's ordinary differential equation from t to t_next (t_next < t: towards data)."""
    return x + (t_next - t) * velocity
