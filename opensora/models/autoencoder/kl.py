"""What the KL autoencoders of the diffusers library share: posterior, scale, micro-batches, no decoder in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from opensora.models.autoencoder.fused_norm import fuse_norms
from opensora.models.autoencoder.items import MapItems, Work, compute_all, in_micro_batches
from opensora.models.autoencoder.posterior import Posterior
from opensora.models.compilation import why_not_compile


class KLAutoencoder(nn.Module, ABC):
    """A KL autoencoder `vae` of diffusers: latents are `scale_factor * (z - shift_factor)`, z from its posterior.

    Args:
        micro_batch_pixels: items go through the network in parts of at most so many pixels; None: there is no limit.
        compile: fuse normalisations with their activations (`fuse_norms`).

    Attributes:
        map_items: computes what the network makes of a batch's items; may be replaced.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        scale_factor: float,
        shift_factor: float,
        micro_batch_pixels: int | None,
        compile: bool,
    ):
        super().__init__()
        if micro_batch_pixels is not None and micro_batch_pixels < 1:
            raise ValueError(f"micro_batch_pixels={micro_batch_pixels} must be at least 1, or None")
        self.vae = vae
        self.scale_factor, self.shift_factor = scale_factor, shift_factor
        self.micro_batch_pixels = micro_batch_pixels
        self.map_items: MapItems = compute_all
        if compile:
            lacking = why_not_compile(next(vae.parameters()).device.type == "cuda")
            if lacking:
                raise ValueError(f"the autoencoder's compile=True needs {lacking}, or set it to False")
            fuse_norms(vae)

    def encode(self, video: Tensor, noise: Callable[[torch.Size], Tensor] | None = None) -> Tensor:
        """Pixels [B, c, T, H, W] in [-1, 1] -> latents [B, C, *latent_size(T, H, W)], a sample of the posterior.

        noise: noise(shape) gives standard normal numbers of the latents' shape; None takes the posterior's mode.

        Raises:
            ValueError: a size that `latent_size` refuses.
        """
        self.latent_size(tuple(video.shape[2:]))
        return Posterior(self.scale_factor, self.shift_factor).latents(self.moments(video), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] -> pixels [B, c, T, H, W], about [-1, 1], not clamped."""
        if self.vae.decoder is None:
            raise RuntimeError("decode after drop_decoder: this autoencoder only encodes; build another one to decode")
        return self.reconstruct(latents / self.scale_factor + self.shift_factor)

    def drop_decoder(self) -> None:
        """Free what only `decode` needs: about half of the weights."""
        self.vae.decoder = None
        self.vae.post_quant_conv = None

    @abstractmethod
    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of a video -> those of its latents."""

    @abstractmethod
    def moments(self, video: Tensor) -> Tensor:
        """Pixels [B, c, T, H, W] -> the posterior's mean, then the logarithm of its variance [B, 2C, t, h, w]."""

    @abstractmethod
    def reconstruct(self, z: Tensor) -> Tensor:
        """A sample of the posterior [B, C, t, h, w] -> pixels [B, c, T, H, W]."""

    def over_items(self, network: Callable[[Tensor], Tensor], pixels: Callable[..., int], unlimited: int) -> Work:
        """What computes `network` of items [1, C, ...]: by `map_items`, in micro-batches of items of one shape.

        Args:
            pixels: pixels(*shape) of an item, `shape` without batch and channels.
            unlimited: items that make a batch where there is no limit of pixels.
        """

        def at_once(shape: torch.Size) -> int:
            limit = self.micro_batch_pixels
            return unlimited if limit is None else max(1, limit // pixels(*shape[2:]))

        return partial(self.map_items, partial(in_micro_batches, network, at_once))
