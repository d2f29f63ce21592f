"""From the posterior that a KL autoencoder's encoder gives to latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of the logarithm of the posterior's variance, as the autoencoders were trained.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """Latents are `scale_factor * (z - shift_factor)`, z from the posterior."""

    scale_factor: float
    shift_factor: float

    def latents(self, moments: Tensor, noise: Callable[[torch.Size], Tensor] | None) -> Tensor:
        """[B, 2C, t, h, w] mean and logarithm of the variance -> [B, C, t, h, w], in the dtype of `moments`.

        noise: noise(shape) gives standard normal numbers of the latents' shape; None takes the posterior's mode.
        """
        z, log_variance = moments.float().chunk(2, dim=1)
        if noise is not None:
            z = z + (log_variance.clamp(*LOG_VARIANCE_RANGE) / 2).exp() * noise(z.shape)
        return (self.scale_factor * (z - self.shift_factor)).to(moments.dtype)
