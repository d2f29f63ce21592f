"""Text, and if wanted references, to video: encoders, sampler and decoder of one config on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import opensora.models  # noqa: F401  registers the components
from opensora.common import to_torch_dtype
from opensora.diffusion.conditions import Span, fill_condition
from opensora.diffusion.random import SampleRandom
from opensora.inference.output import to_uint8
from opensora.inference.references import read_span
from opensora.inference.sampler import Sampler, SamplerOptions, TextEmbedding
from opensora.inference.size import SampleSize
from opensora.models.compilation import compile_blocks
from opensora.models.frozen import build_frozen
from opensora.models.weights import build_model
from opensora.parallel.shardformer import apply_shardformer
from opensora.registry import AUTOENCODERS, TEXT_ENCODERS
from opensora.settings import check_text_width


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        text, negative: what the text encoders get.
        condition: one of `conditions.CONDITIONS`; references: paths that it takes its frames from.
        seed: of all noise of this sample.
    """

    text: str
    seed: int
    negative: str = ""
    condition: str = "t2v"
    references: tuple[str, ...] = ()


class Pipeline:
    """Samples of one size.

    Noise is drawn on the host from each request's own seed, so a sample does not depend on its batch or its device.
    """

    def __init__(
        self,
        model: nn.Module,
        autoencoder: nn.Module,
        t5: nn.Module,
        clip: nn.Module,
        *,
        options: SamplerOptions,
        size: SampleSize,
        device: torch.device,
        dtype: torch.dtype,
    ):
        _check_fit(model, autoencoder)
        self.autoencoder, self.t5, self.clip = autoencoder, t5, clip
        self.sampler = Sampler(model, options, dtype)
        self.size, self.device, self.dtype = size, device, dtype
        self.takes_references = model.cond_embed

    @classmethod
    def from_config(
        cls, cfg, size: SampleSize, weights: Path | None, lora: Path | None, device: torch.device
    ) -> Pipeline:
        """Build and load what `cfg` names, ready to sample on `device`.

        weights: where `model.from_pretrained` was found; None draws the model's initial weights.
        lora: adapters to merge into them.
        """
        dtype = to_torch_dtype(cfg.dtype)

        t5 = apply_shardformer(build_frozen(TEXT_ENCODERS, cfg.t5, "t5", dtype, device))
        clip = build_frozen(TEXT_ENCODERS, cfg.clip, "clip", dtype, device)
        for section, encoder in (("t5", t5), ("clip", clip)):
            check_text_width(cfg, section, encoder.width)  # of a hub name only known now
        torch.manual_seed(cfg.seed)  # initial weights are those that training with this seed starts from
        model_settings = {**cfg.model, "from_pretrained": weights and str(weights)}
        model = build_model(model_settings, dtype, device, cfg.use_ema, lora=lora, lora_scale=cfg.lora_scale)
        model.eval().requires_grad_(False)
        if cfg.model.compile:
            compile_blocks(model)
        return cls(
            model,
            build_frozen(AUTOENCODERS, cfg.ae, "ae", dtype, device),
            t5,
            clip,
            options=SamplerOptions.from_config(cfg.sampling_option),
            size=size,
            device=device,
            dtype=dtype,
        )

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request], on_step: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Frames uint8 [T, H, W, 3] on the host for each request; on_step is called after every step."""
        latents = self.sample_latents(requests, on_step)  # [B, C, t, h, w]
        decoded = (self.autoencoder.decode(one.to(self.dtype)) for one in latents.split(1))  # [1, 3, T, H, W] each
        return [to_uint8(video[0]) for video in decoded]

    @torch.inference_mode()
    def sample_latents(self, requests: Sequence[Request], on_step: Callable[[], None] = lambda: None) -> Tensor:
        """Latents [B, C, T, H, W] fp32 of the requests."""
        draws = SampleRandom([request.seed for request in requests], "cpu")
        pixels = (self.size.num_frames, self.size.height, self.size.width)
        shape = (self.autoencoder.latent_channels, *self.autoencoder.latent_size(pixels))
        noise = draws.normal(shape).to(self.device)  # [B, C, t, h, w]
        condition = self._condition(requests, noise, draws) if self.takes_references else None
        text = self._embed([request.text for request in requests])
        negative = self._embed([request.negative for request in requests])
        return self.sampler(noise, text, negative, condition, on_step)

    def _embed(self, texts: Sequence[str]) -> TextEmbedding:
        """Each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts], device=self.device)
        tokens, vector = self.t5(distinct).to(self.dtype), self.clip(distinct).to(self.dtype)
        return TextEmbedding(tokens[rows], vector[rows])  # [B, S, D], [B, V]

    def _condition(self, requests: Sequence[Request], like: Tensor, draws: SampleRandom) -> Tensor:
        """[B, 1 + C, T, H, W] beside latents of the shape of `like`."""

        def encode_span(span: Span, samples: list[int]) -> Tensor:
            clips = [read_span(requests[i].references, span, self.size) for i in samples]  # [3, frames, H, W] each
            video = torch.stack(clips).to(self.device, self.dtype)
            generators = draws.select(samples)
            return self.autoencoder.encode(
                video, lambda shape: generators.normal(shape[1:], self.dtype).to(self.device)
            )

        names = [request.condition for request in requests]
        return fill_condition(like, names, encode_span, self.autoencoder.is_causal)


def _check_fit(model: nn.Module, autoencoder: nn.Module) -> None:
    features = autoencoder.latent_channels * model.patch_size**2
    if model.in_channels != features:
        raise ValueError(
            f"model.in_channels={model.in_channels} does not fit the autoencoder: {autoencoder.latent_channels} latent "
            f"channels in {model.patch_size} x {model.patch_size} patches make {features}"
        )
