"""Text, and if wanted references, to video: encoders, sampler and decoder of one config on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import opensora.models  # noqa: F401  registers the components
from opensora.common import to_torch_dtype
from opensora.diffusion.conditions import Span, fill_condition
from opensora.diffusion.random import SampleRandom
from opensora.inference.division import UNDIVIDED, Division
from opensora.inference.offload import called_at_work, residence
from opensora.inference.output import to_uint8
from opensora.inference.phases import PhaseMeter
from opensora.inference.references import read_span
from opensora.inference.sampler import Sampler, SamplerOptions, TextEmbedding
from opensora.inference.size import SampleSize
from opensora.inference.text_phase import build_text_encoder
from opensora.models.compilation import compile_blocks
from opensora.models.frozen import build_frozen
from opensora.models.weights import build_model
from opensora.registry import AUTOENCODERS

TextEncoder = Callable[[Sequence[str]], Tensor]


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

    Args:
        t5, clip: texts -> embeddings [B, S, D] and [B, V], on any device.
        offload: the transformer and the autoencoder were built on the host, and each is to be on `device` only while
            it computes.
        meter: told of the phases "condition", "diffusion" and "decode".
        division: the ranks that the models have been divided among.
    """

    def __init__(
        self,
        model: nn.Module,
        autoencoder: nn.Module,
        t5: TextEncoder,
        clip: TextEncoder,
        *,
        options: SamplerOptions,
        size: SampleSize,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool = False,
        meter: PhaseMeter | None = None,
        division: Division = UNDIVIDED,
    ):
        _check_fit(model, autoencoder)
        self.autoencoder, self.t5, self.clip = autoencoder, t5, clip
        self.sampler = Sampler(model, options, dtype, division.model.of_first)
        self.size, self.device, self.dtype = size, device, dtype
        self.takes_references = model.cond_embed
        self._model_at_work = residence(model, device, offload)
        self._autoencoder_at_work = residence(autoencoder, device, offload)
        self._meter = meter or nullcontext  # of whoever measures memory himself, peaks are not reset

    @classmethod
    def from_config(
        cls,
        cfg,
        size: SampleSize,
        weights: Path | None,
        lora: Path | None,
        device: torch.device,
        texts: tuple[TextEncoder, TextEncoder] | None = None,
        meter: PhaseMeter | None = None,
        division: Division = UNDIVIDED,
    ) -> Pipeline:
        """Build and load what `cfg` names, ready to sample on `device`; with a `division`, by all its ranks together.

        weights: where `model.from_pretrained` was found; None draws the model's initial weights.
        lora: adapters to merge into them.
        texts: what knows the embeddings of all texts to come (`text_phase.embed_texts`), in place of the encoders.
        """
        dtype, home = to_torch_dtype(cfg.dtype), home_of(cfg, device)
        t5, clip = texts or (
            called_at_work(build_text_encoder(cfg, section, dtype, home), device, cfg.offload)
            for section in ("t5", "clip")
        )
        torch.manual_seed(cfg.seed)  # initial weights are those that training with this seed starts from
        settings = {**cfg.model, "from_pretrained": weights and str(weights)}
        adapters = {"lora": lora, "lora_scale": cfg.lora_scale}
        return cls(
            build_transformer(settings, "model", dtype, home, division, cfg.use_ema, **adapters),
            build_autoencoder(cfg.ae, "ae", dtype, home, division),
            t5,
            clip,
            options=SamplerOptions.from_config(cfg.sampling_option),
            size=size,
            device=device,
            dtype=dtype,
            offload=cfg.offload,
            meter=meter,
            division=division,
        )

    @torch.inference_mode()
    def __call__(self, requests: Sequence[Request], on_step: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Frames uint8 [T, H, W, 3] on the host for each request; on_step is called after every step."""
        latents = self.sample_latents(requests, on_step)  # [B, C, t, h, w]
        with self._meter("decode"), self._autoencoder_at_work():
            decoded = (self.autoencoder.decode(one.to(self.dtype)) for one in latents.split(1))  # [1, 3, T, H, W] each
            return [to_uint8(video[0]) for video in decoded]

    @torch.inference_mode()
    def sample_latents(self, requests: Sequence[Request], on_step: Callable[[], None] = lambda: None) -> Tensor:
        """Latents [B, C, T, H, W] fp32 of the requests."""
        draws = SampleRandom([request.seed for request in requests], "cpu")
        pixels = (self.size.num_frames, self.size.height, self.size.width)
        shape = (self.autoencoder.latent_channels, *self.autoencoder.latent_size(pixels))
        noise = draws.normal(shape).to(self.device)  # [B, C, t, h, w]
        text = self._embed([request.text for request in requests])
        negative = self._embed([request.negative for request in requests])
        condition = None
        if self.takes_references and any(request.condition != "t2v" for request in requests):
            with self._meter("condition"), self._autoencoder_at_work():
                condition = self._condition(requests, noise, draws)
        with self._meter("diffusion"), self._model_at_work():
            rising = torch.tensor([request.condition.startswith("i2v") for request in requests])
            return self.sampler(noise, text, negative, condition, on_step, rising)

    def _embed(self, texts: Sequence[str]) -> TextEmbedding:
        """Each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts], device=self.device)
        tokens, vector = (encode(distinct).to(self.device, self.dtype) for encode in (self.t5, self.clip))
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


def home_of(cfg, device: torch.device) -> torch.device:
    """Where models are built: with `offload` they come to the device when they compute."""
    return torch.device("cpu") if cfg.offload else device


def build_transformer(
    settings: Mapping[str, Any],
    where: str,
    dtype: torch.dtype,
    home: torch.device,
    division: Division = UNDIVIDED,
    use_ema: bool = False,
    **lora: Any,
) -> nn.Module:
    """The transformer of a config's section `where`, loaded and ready to sample."""
    model = build_model(settings, dtype, home, use_ema, where, **lora).eval().requires_grad_(False)
    division.divide_transformer(model)
    if settings["compile"]:
        compile_blocks(model)
    return model


def build_autoencoder(
    settings: Mapping[str, Any], where: str, dtype: torch.dtype, home: torch.device, division: Division = UNDIVIDED
) -> nn.Module:
    """The autoencoder of a config's section `where`, loaded."""
    autoencoder = build_frozen(AUTOENCODERS, settings, where, dtype, home)
    division.divide_autoencoder(autoencoder)
    return autoencoder


def _check_fit(model: nn.Module, autoencoder: nn.Module) -> None:
    features = autoencoder.latent_channels * model.patch_size**2
    if model.in_channels != features:
        raise ValueError(
            f"model.in_channels={model.in_channels} does not fit the autoencoder: {autoencoder.latent_channels} latent "
            f"channels in {model.patch_size} x {model.patch_size} patches make {features}"
        )
