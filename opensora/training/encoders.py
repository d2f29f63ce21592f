"""Latents and text embeddings of a batch: by the frozen encoders, or from what they made of the table before.

Both make the same random draws in the same order (`diffusion.random`), so a run with a cache trains on what a run
without would have trained on. Text dropout is drawn while training, and a cache holds the embeddings of "". Of a KL
autoencoder a cache holds the posterior, which is sampled while training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora.data.batch import Batch
from opensora.data.transforms import normalise
from opensora.diffusion.conditions import Span, build_condition, fill_condition, given_frames
from opensora.diffusion.random import SampleRandom
from opensora.models.autoencoder.kl import KLAutoencoder
from opensora.models.autoencoder.posterior import Posterior

LATENTS = "latents"  # in a cache's entries, beside the names of spans


class VideoEncoder:
    """Encodes pixels by a frozen autoencoder."""

    def __init__(self, autoencoder: nn.Module, device: torch.device, dtype: torch.dtype):
        self.autoencoder, self.device, self.dtype = autoencoder, device, dtype

    def open(self, batch: Batch) -> PixelClips:
        video = normalise(batch.video.to(self.device, non_blocking=True), self.dtype)  # [B, 3, T, H, W] in [-1, 1]
        return PixelClips(video, self.autoencoder, self.dtype)

    def entries(self, video: Tensor, spans: Sequence[Span]) -> dict[str, Tensor]:
        """What a cache holds of uint8 clips [B, 3, T, H, W]: of a KL autoencoder moments, else latents, [B, ...]."""
        encode = self.autoencoder.moments if isinstance(self.autoencoder, KLAutoencoder) else self.autoencoder.encode
        video = normalise(video.to(self.device, non_blocking=True), self.dtype)
        latent_frames = self.autoencoder.latent_size(tuple(video.shape[2:]))[0]
        given = given_frames(video, latent_frames, self.autoencoder.is_causal)
        return {LATENTS: encode(video).to(self.dtype)} | {
            span.name: encode(span.of(given)).to(self.dtype) for span in spans
        }

    def entry_bytes(self, size: tuple[int, int, int], spans: Sequence[Span]) -> int:
        """Of one clip of `size` (frames, height, width) in a cache."""
        sizes = [size, *((span.frames, *size[1:]) for span in spans)]
        latents = sum(math.prod(self.autoencoder.latent_size(size)) for size in sizes)
        channels = self.autoencoder.latent_channels * (1 if self.posterior is None else 2)
        return latents * channels * self.dtype.itemsize

    @property
    def posterior(self) -> Posterior | None:
        """What turns a cache's moments into latents; None if it holds latents."""
        if not isinstance(self.autoencoder, KLAutoencoder):
            return None
        return Posterior(self.autoencoder.scale_factor, self.autoencoder.shift_factor)


@dataclass(frozen=True)
class PixelClips:
    """video: [B, 3, T, H, W] in [-1, 1]."""

    video: Tensor
    autoencoder: nn.Module
    dtype: torch.dtype

    @property
    def num_frames(self) -> int:
        return self.video.shape[2]

    def latents(self, draws: SampleRandom) -> Tensor:
        """[B, C, t, h, w]"""
        return self._encode(self.video, draws)

    def condition(self, latents: Tensor, names: Sequence[str], draws: SampleRandom) -> Tensor:
        """[B, 1 + C, t, h, w]"""
        encode = lambda frames, samples: self._encode(frames, draws.select(samples))  # noqa: E731
        return build_condition(self.video, latents, names, encode, causal=self.autoencoder.is_causal)

    def _encode(self, video: Tensor, draws: SampleRandom) -> Tensor:
        return self.autoencoder.encode(video, lambda shape: draws.normal(shape[1:], self.dtype)).to(self.dtype)


class CachedVideo:
    """Takes what `VideoEncoder.entries` made from the batch.

    Args:
        posterior: of the autoencoder that made it. is_causal: whether that is.
    """

    def __init__(self, posterior: Posterior | None, is_causal: bool, device: torch.device, dtype: torch.dtype):
        self.posterior, self.is_causal, self.device, self.dtype = posterior, is_causal, device, dtype

    def open(self, batch: Batch) -> CachedClips:
        entries = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.encoded.items()}
        return CachedClips(entries, batch.num_frames, self.posterior, self.is_causal, self.dtype)


@dataclass(frozen=True)
class CachedClips:
    """entries: [B, ...] by name. num_frames: of the clips, in pixels' frames."""

    entries: Mapping[str, Tensor]
    num_frames: int
    posterior: Posterior | None
    is_causal: bool
    dtype: torch.dtype

    def latents(self, draws: SampleRandom) -> Tensor:
        """[B, C, t, h, w]"""
        return self._sample(self.entries[LATENTS], draws)

    def condition(self, latents: Tensor, names: Sequence[str], draws: SampleRandom) -> Tensor:
        """[B, 1 + C, t, h, w]"""

        def encoded_span(span: Span, samples: list[int]) -> Tensor:
            return self._sample(self.entries[span.name][samples], draws.select(samples))

        return fill_condition(latents, names, encoded_span, self.is_causal)

    def _sample(self, entry: Tensor, draws: SampleRandom) -> Tensor:
        if self.posterior is None:
            return entry.to(self.dtype)
        return self.posterior.latents(entry, lambda shape: draws.normal(shape[1:], self.dtype)).to(self.dtype)


class TextEncoders:
    """Encodes captions by the frozen text encoders.

    Args:
        dropout: probability by encoder ("t5", "clip") that a sample's text is replaced by "".
    """

    def __init__(self, t5: nn.Module, clip: nn.Module, dropout: Mapping[str, float], dtype: torch.dtype):
        self.encoders = {"t5": t5, "clip": clip}
        self.dropout, self.dtype = dict(dropout), dtype

    def __call__(self, batch: Batch, draws: SampleRandom) -> tuple[Tensor, Tensor]:
        """[B, S, D] of T5, [B, V] of CLIP"""
        t5, clip = (
            encoder(
                [
                    "" if dropped else text
                    for text, dropped in zip(batch.text, drop(self.dropout, name, draws), strict=True)
                ]
            )
            for name, encoder in self.encoders.items()
        )
        return t5.to(self.dtype), clip.to(self.dtype)

    def entries(self, texts: list[str]) -> dict[str, Tensor]:
        """What a cache holds of captions: [N, ...] by encoder."""
        return {name: encoder(texts).to(self.dtype) for name, encoder in self.encoders.items()}


class CachedText:
    """Takes the embeddings from the batch.

    Args:
        empty: the embeddings of "", by encoder.
    """

    def __init__(self, empty: Mapping[str, Tensor], dropout: Mapping[str, float], device: torch.device):
        self.encoders: dict[str, nn.Module] = {}  # none is in use
        self.empty = {name: tensor.to(device) for name, tensor in empty.items()}
        self.dropout, self.device = dict(dropout), device

    def __call__(self, batch: Batch, draws: SampleRandom) -> tuple[Tensor, Tensor]:
        """[B, S, D] of T5, [B, V] of CLIP"""
        return self._embed(batch, "t5", draws), self._embed(batch, "clip", draws)

    def _embed(self, batch: Batch, name: str, draws: SampleRandom) -> Tensor:
        stored = batch.encoded[name].to(self.device, non_blocking=True)  # [B, ...]
        dropped = drop(self.dropout, name, draws)
        return torch.stack([self.empty[name] if drops else text for text, drops in zip(stored, dropped, strict=True)])


def drop(dropout: Mapping[str, float], encoder: str, draws: SampleRandom) -> list[bool]:
    """Whether each sample's text is dropped for an encoder."""
    return [u < dropout.get(encoder, 0.0) for u in draws.uniform()]
