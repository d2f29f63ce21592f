"""The mathematics of one training step: frozen encoders, flow matching, the loss. Single device, no parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora.data.batch import Batch
from opensora.data.transforms import normalise
from opensora.diffusion.conditions import build_condition, draw_condition
from opensora.diffusion.flow import flow_matching_loss, interpolate, velocity_target
from opensora.diffusion.random import SampleRandom
from opensora.diffusion.schedule import training_timesteps
from opensora.diffusion.tokens import pack, position_ids, text_position_ids

# What a model with a guidance embedding is told in training (flux-dev's default).
TRAINING_GUIDANCE = 4.0


@dataclass(frozen=True)
class StepInputs:
    """A batch in the model's terms; floating tensors in the training dtype.

    Attributes:
        latents, noise: [B, C, T, H, W].
        t: [B], 0 is data and 1 is noise.
        text: [B, S, D] of the T5 encoder.
        text_vector: [B, V] of the CLIP encoder.
        condition: [B, 1 + C, T, H, W], mask first; None for a model without `cond_embed`.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    text_vector: Tensor
    condition: Tensor | None

    def num_tokens(self, patch_size: int) -> int:
        """Tokens that the transformer attends over, text included, in the whole batch."""
        batch, _, frames, height, width = self.latents.shape
        return batch * (frames * height * width // patch_size**2 + self.text.shape[1])


class FlowMatchingStep:
    """Turns batches into inputs and inputs into a loss.

    Args:
        autoencoder, t5, clip: frozen encoders on `device`.
        patch_size: of the transformer.
        text_dropout: probability by encoder ("t5", "clip") that a sample's text is replaced by "".
        condition_config: weights of conditions; None trains without a condition.
        guidance_embed: whether the model takes a guidance scale.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        t5: nn.Module,
        clip: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        patch_size: int,
        text_dropout: Mapping[str, float] | None = None,
        condition_config: Mapping[str, float] | None = None,
        guidance_embed: bool = False,
    ):
        self.autoencoder, self.t5, self.clip = autoencoder, t5, clip
        self.device, self.dtype, self.patch_size = device, dtype, patch_size
        self.text_dropout = dict(text_dropout or {})
        self.condition_config = condition_config
        self.guidance_embed = guidance_embed

    @torch.no_grad()
    def encode(self, batch: Batch) -> StepInputs:
        """Run the frozen encoders and make every random choice, each from its sample's own generator."""
        draws = SampleRandom(batch.seed, self.device)
        video = normalise(batch.video.to(self.device, non_blocking=True), self.dtype)  # [B, 3, T, H, W] in [-1, 1]
        latents = self._encode_video(video, draws)  # [B, C, t, h, w]
        condition = self._condition(video, latents, draws)
        t = training_timesteps(draws.normal(()), tuple(latents.shape[2:]), self.dtype)  # [B]
        text = self.t5(self._drop(batch.text, "t5", draws)).to(self.dtype)  # [B, S, D]
        text_vector = self.clip(self._drop(batch.text, "clip", draws)).to(self.dtype)  # [B, V]
        noise = draws.normal(latents.shape[1:], self.dtype)  # [B, C, t, h, w]
        return StepInputs(latents, noise, t, text, text_vector, condition)

    def loss(self, model: nn.Module, inputs: StepInputs) -> Tensor:
        """The flow-matching loss of the batch, a scalar in fp32."""
        batch, latent_size = len(inputs.t), tuple(inputs.latents.shape[2:])
        noisy = interpolate(inputs.latents, inputs.noise, inputs.t)
        prediction = model(
            img=pack(noisy, self.patch_size),
            img_ids=position_ids(batch, latent_size, self.patch_size, self.device),
            txt=inputs.text,
            txt_ids=text_position_ids(batch, inputs.text.shape[1], self.device),
            timesteps=inputs.t,
            y_vec=inputs.text_vector,
            cond=None if inputs.condition is None else pack(inputs.condition, self.patch_size),
            guidance=torch.full_like(inputs.t, TRAINING_GUIDANCE) if self.guidance_embed else None,
        )  # [B, L, C * p * p]
        target = velocity_target(inputs.latents, inputs.noise)
        return flow_matching_loss(prediction, pack(target, self.patch_size))

    def _encode_video(self, video: Tensor, draws: SampleRandom) -> Tensor:
        return self.autoencoder.encode(video, lambda shape: draws.normal(shape[1:], self.dtype)).to(self.dtype)

    def _condition(self, video: Tensor, latents: Tensor, draws: SampleRandom) -> Tensor | None:
        if self.condition_config is None:
            return None
        names = [draw_condition(self.condition_config, video.shape[2], u) for u in draws.uniform()]
        encode = lambda frames, samples: self._encode_video(frames, draws.select(samples))  # noqa: E731
        return build_condition(video, latents, names, encode, causal=self.autoencoder.is_causal)

    def _drop(self, texts: list[str], encoder: str, draws: SampleRandom) -> list[str]:
        probability = self.text_dropout.get(encoder, 0.0)
        return ["" if u < probability else text for u, text in zip(draws.uniform(), texts, strict=True)]
