"""From noise to latents: Euler steps along the guided velocity of a flow-matching transformer (spec 10)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.diffusion.flow import euler_step
from opensora.diffusion.guidance import (
    FULL,
    NEITHER,
    NO_TEXT,
    Branch,
    combine,
    needed_branches,
    oscillate,
    temporal_scale,
)
from opensora.diffusion.schedule import sampling_schedule
from opensora.diffusion.tokens import pack, position_ids, text_position_ids, unpack
from opensora.inference.step_cache import StepCache, Velocity

METHODS = ("i2v", "distill")


@dataclass(frozen=True)
class SamplerOptions:
    """How to walk from noise to data: the part of a config's `sampling_option` that is not about size.

    Attributes:
        num_steps: Euler steps.
        guidance, guidance_img: scales of the text's and of the reference's guidance; 1 is none.
        text_osci, image_osci: drop the scale to 1 at every odd step from the 10th on.
        scale_temporal_osci: let the reference's guidance rise from 1 at the first latent frame.
        shift, flow_shift: shift the schedule towards noise, by `flow_shift` or by what the size asks for.
        step_cache: reuse a velocity while its estimated relative change is below this (`step_cache.py`); None: never.
        method: "i2v" guides with two or three velocities a step, "distill" tells the scale to a distilled model.
    """

    num_steps: int = 50
    guidance: float = 4.0
    guidance_img: float | None = None
    text_osci: bool = False
    image_osci: bool = False
    scale_temporal_osci: bool = False
    shift: bool = True
    flow_shift: float | None = None
    step_cache: float | None = None
    method: str = "i2v"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"sampling_option.method='{self.method}' is unknown: one of {', '.join(METHODS)}")
        if self.flow_shift is not None and not self.flow_shift > 0:
            raise ValueError(f"sampling_option.flow_shift={self.flow_shift} must be above 0")
        if self.flow_shift is not None and not self.shift:
            raise ValueError(
                f"sampling_option.flow_shift={self.flow_shift} shifts nothing with sampling_option.shift=False: leave "
                "one of them out"
            )
        if self.num_steps < 1:
            raise ValueError(f"sampling_option.num_steps={self.num_steps} must be at least 1")

    @classmethod
    def from_config(cls, sampling_option: Mapping[str, Any]) -> SamplerOptions:
        """The fields that `sampling_option` gives; it holds more, about sizes and seeds."""
        given = {field.name: sampling_option[field.name] for field in fields(cls) if field.name in sampling_option}
        return cls(**given)

    def scales(self, step: int) -> tuple[float, float]:
        """(text scale, reference scale) at a step, before `temporal_scale`."""
        if self.method == "distill":
            return 1.0, 1.0
        image = 1.0 if self.guidance_img is None else self.guidance_img
        text_scale = oscillate(self.guidance, step) if self.text_osci else self.guidance
        image_scale = oscillate(image, step) if self.image_osci else image
        return text_scale, image_scale


@dataclass(frozen=True)
class TextEmbedding:
    """Texts as the model takes them: tokens [B, S, D] and one vector [B, V] each."""

    tokens: Tensor
    vector: Tensor

    def rows(self, rows: Tensor | None) -> TextEmbedding:
        """Some texts of the batch; None: all."""
        return self if rows is None else TextEmbedding(self.tokens[rows], self.vector[rows])

    def equal_rows(self, other: TextEmbedding) -> Tensor:
        """[B], which texts are the same."""
        pairs = ((self.tokens, other.tokens), (self.vector, other.vector))
        tokens, vector = ((ours == theirs).flatten(1).all(1) for ours, theirs in pairs)
        return tokens & vector


class Sampler:
    """Draws latents from a model.

    The state stays in fp32; the model sees it, and the time, in `dtype`. The velocities of a step are computed one
    after the other, so that guidance does not multiply the peak memory, and only those that the step's scales need.

    agree: of ranks that share the model, the first one's value of a tensor (`RankGroup.of_first`).

    Attributes:
        reused: the share of the last call's velocities that the step cache gave; 0 without it.
    """

    def __init__(
        self,
        model: nn.Module,
        options: SamplerOptions,
        dtype: torch.dtype,
        agree: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        self.model, self.options, self.dtype, self._agree = model, options, dtype, agree
        self.patch_size = model.patch_size
        self.reused = 0.0

    def times(self, latent_size: tuple[int, int, int]) -> list[float]:
        """The schedule for latents of size (T, H, W), from 1 to 0."""
        frames, height, width = latent_size
        tokens_per_frame = height * width // self.patch_size**2
        options = self.options
        return sampling_schedule(options.num_steps, tokens_per_frame, frames, options.shift, options.flow_shift)

    @torch.inference_mode()
    def __call__(
        self,
        noise: Tensor,
        text: TextEmbedding,
        negative: TextEmbedding,
        condition: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
        rising: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, C, T, H, W] fp32 from `noise` of the same shape.

        text, negative: of the prompts and of the negative prompts, in the model's dtype. condition: [B, 1 + C, T, H, W]
        of the references, or None; the latents it gives stand in the result as they are. on_step: called after
        every step. rising: [B], for which samples `scale_temporal_osci` counts (spec 10: image to video); None: all.
        """
        latent_size = tuple(noise.shape[2:])
        masked = noise.new_zeros(len(noise)) if condition is None else condition[:, 0].flatten(1).any(1)
        samples = list(zip((masked > 0).tolist(), text.equal_rows(negative).tolist(), strict=True))
        compute = self._velocities(noise, text, negative, condition)
        velocity = StepCache(compute, self.options.step_cache, self._agree)
        x = pack(noise.float(), self.patch_size)  # [B, L, C * p * p]
        for step, (t, t_next) in enumerate(itertools.pairwise(self.times(latent_size))):
            text_scale, image_scale = self.options.scales(step)
            needed = [needed_branches(text_scale, image_scale, *sample) for sample in samples]
            velocities = _velocities_of(needed, lambda *call, x=x, t=t: velocity(x, t, *call), x.device)
            image_scale = self._scale_of_tokens(image_scale, step, latent_size, rising, x.device)
            x = euler_step(x, combine(velocities, text_scale, image_scale), t, t_next)
            on_step()
        self.reused = velocity.reused
        latents = unpack(x, latent_size, self.patch_size)
        if condition is not None:
            latents = torch.where(condition[:, :1] > 0, condition[:, 1:].float(), latents)
        return latents

    def _velocities(
        self, noise: Tensor, text: TextEmbedding, negative: TextEmbedding, condition: Tensor | None
    ) -> Velocity:
        """velocity(x [N, L, C * p * p], t, branch, rows) -> the same shape, fp32, for N samples of the batch, those of
        `rows` or all. What does not change is prepared once."""
        (batch, channels, *latent_size), device = noise.shape, noise.device
        image_ids = position_ids(batch, tuple(latent_size), self.patch_size, device)
        text_ids = text_position_ids(batch, text.tokens.shape[1], device)
        given = nothing = None
        if self.model.cond_embed:
            nothing = pack(noise.new_zeros(batch, 1 + channels, *latent_size, dtype=self.dtype), self.patch_size)
            given = nothing if condition is None else pack(condition.to(self.dtype), self.patch_size)

        def velocity(x: Tensor, t: float, branch: Branch, rows: Tensor | None = None) -> Tensor:
            words = (text if branch.text else negative).rows(rows)
            cond = given if branch.reference else nothing
            each = partial(torch.full, (len(x),), dtype=self.dtype, device=device)
            return self.model(
                img=x.to(self.dtype),
                img_ids=image_ids[: len(x)],
                txt=words.tokens,
                txt_ids=text_ids[: len(x)],
                timesteps=each(t),
                y_vec=words.vector,
                cond=cond if cond is None or rows is None else cond[rows],
                guidance=each(self.options.guidance) if self.model.guidance_embed else None,
            ).float()

        return velocity

    def _scale_of_tokens(
        self, scale: float, step: int, latent_size: tuple[int, int, int], rising: Tensor | None, device: torch.device
    ) -> float | Tensor:
        """The reference scale, or where it rises along time, one for each token [L, 1] or [B, L, 1]."""
        if not self.options.scale_temporal_osci or scale <= 1.0:
            return scale
        frames, height, width = latent_size
        of_frames = temporal_scale(scale, step, self.options.num_steps, frames).to(device)  # [T]
        of_tokens = of_frames.repeat_interleave(height * width // self.patch_size**2)[:, None]  # [L, 1]
        return of_tokens if rising is None else torch.where(rising.to(device)[:, None, None], of_tokens, scale)


def _velocities_of(
    needed: Sequence[Sequence[Branch]], velocity: Callable[[Branch, Tensor | None], Tensor], device: torch.device
) -> dict[Branch, Tensor]:
    """The velocities [B, L, D] of all branches that samples need, each computed for those samples alone.

    For the others it is the branch that they would have in its place (`needed_branches`): so a sample is computed, and
    its steps are cached, as they would be without the rest of its batch. velocity(branch, rows [N]) -> [N, L, D].
    """
    found: dict[Branch, Tensor] = {}
    for branch in (FULL, NO_TEXT, NEITHER):
        rows = [i for i, branches in enumerate(needed) if branch in branches]
        if len(rows) == len(needed):
            found[branch] = velocity(branch, None)
        elif rows:
            some, stand_in = torch.tensor(rows, device=device), next(reversed(found.values()))
            found[branch] = stand_in.index_copy(0, some, velocity(branch, some))
    return found
