"""The mathematics of one training step: frozen encoders, flow matching, the loss. Single device, no parallelism."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora.data.batch import Batch
from opensora.diffusion.conditions import draw_condition
from opensora.diffusion.flow import flow_matching_loss, interpolate, velocity_target
from opensora.diffusion.random import SampleRandom
from opensora.diffusion.schedule import training_timesteps
from opensora.diffusion.tokens import pack, position_ids, text_position_ids
from opensora.training.encoders import CachedClips, CachedText, CachedVideo, PixelClips, TextEncoders, VideoEncoder

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
        video, text: what gives latents and embeddings for a batch (see `training.encoders`).
        patch_size: of the transformer.
        condition_config: weights of conditions; None trains without a condition.
        guidance_embed: whether the model takes a guidance scale.
    """

    def __init__(
        self,
        video: VideoEncoder | CachedVideo,
        text: TextEncoders | CachedText,
        *,
        device: torch.device,
        dtype: torch.dtype,
        patch_size: int,
        condition_config: Mapping[str, float] | None = None,
        guidance_embed: bool = False,
    ):
        self.video, self.text = video, text
        self.device, self.dtype, self.patch_size = device, dtype, patch_size
        self.condition_config = condition_config
        self.guidance_embed = guidance_embed

    def with_encoders(self, video: VideoEncoder | CachedVideo, text: TextEncoders | CachedText) -> FlowMatchingStep:
        """The same step with other encoders."""
        step = copy.copy(self)
        step.video, step.text = video, text
        return step

    @torch.no_grad()
    def encode(self, batch: Batch) -> StepInputs:
        """Run the frozen encoders and make every random choice, each from its sample's own generator."""
        draws = SampleRandom(batch.seed, self.device)
        clips = self.video.open(batch)
        latents = clips.latents(draws)  # [B, C, t, h, w]
        condition = self._condition(clips, latents, draws)
        t = training_timesteps(draws.normal(()), tuple(latents.shape[2:]), self.dtype)  # [B]
        text, text_vector = self.text(batch, draws)  # [B, S, D], [B, V]
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

    def _condition(self, clips: PixelClips | CachedClips, latents: Tensor, draws: SampleRandom) -> Tensor | None:
        if self.condition_config is None:
            return None
        names = [draw_condition(self.condition_config, clips.num_frames, u) for u in draws.uniform()]
        return clips.condition(latents, names, draws)
