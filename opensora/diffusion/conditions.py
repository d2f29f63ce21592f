"""Which frames of a video the model is given (text-, image-, video-to-video), and the condition tensor they make.

A condition names spans of frames at the head or the tail of the clip. The frames of a span are encoded on their own,
never cut out of the encoded clip: at sampling time the rest of the video does not exist (spec 5.4).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """`frames` frames of a clip (for a causal autoencoder, 4k + 1), at its head or at its tail."""

    frames: int
    tail: bool

    @property
    def name(self) -> str:
        return f"{'tail' if self.tail else 'head'}_{self.frames}"

    def of(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the span's frames [B, C, frames, H, W]."""
        return video[:, :, -self.frames :] if self.tail else video[:, :, : self.frames]

    def slice(self, num_latent_frames: int) -> slice:
        """Where `num_latent_frames` latent frames of the span go in the clip's latents."""
        return slice(-num_latent_frames, None) if self.tail else slice(num_latent_frames)


# The first and last frame, 33 or 65 frames; an autoencoder without a first frame of its own takes 32 or 64.
_SPANS = {
    "t2v": (),
    "i2v_head": (Span(1, tail=False),),
    "i2v_tail": (Span(1, tail=True),),
    "i2v_loop": (Span(1, tail=False), Span(1, tail=True)),
    "v2v_head": (Span(33, tail=False),),
    "v2v_tail": (Span(33, tail=True),),
    "v2v_head_easy": (Span(65, tail=False),),
    "v2v_tail_easy": (Span(65, tail=True),),
}
CONDITIONS = tuple(_SPANS)


def check_condition(name: str, where: str) -> None:
    if name not in _SPANS:
        raise ValueError(f"{where}: unknown condition '{name}', one of {', '.join(CONDITIONS)}")


def condition_spans(name: str, causal: bool = True) -> tuple[Span, ...]:
    """The spans of frames that condition `name` gives."""
    check_condition(name, "cond_type")
    return tuple(span if causal or span.frames == 1 else span._replace(frames=span.frames - 1) for span in _SPANS[name])


def fits(name: str, num_frames: int) -> bool:
    """Whether a clip of `num_frames` frames is a video and long enough to hold the frames of condition `name`."""
    return all(num_frames > 1 and span.frames <= num_frames for span in _SPANS[name])


def check_condition_config(condition_config: Mapping[str, float]) -> None:
    """ValueError for a `condition_config` with an unknown condition, a negative weight, or nothing to choose from."""
    for name, weight in condition_config.items():
        check_condition(name, "condition_config")
        if not isinstance(weight, (int, float)) or weight < 0:
            raise ValueError(f"condition_config.{name}={weight!r} must be a weight of 0 or more")
    if not sum(condition_config.values()) > 0:
        raise ValueError("condition_config gives no condition a weight above 0: set one, e.g. condition_config.t2v=1")


def draw_condition(condition_config: Mapping[str, float], num_frames: int, u: float) -> str:
    """The condition of a sample: weighted choice by `u` in [0, 1) among those that fit a clip of `num_frames`.

    Images, and clips too short for every condition of the config, are plain "t2v".
    """
    options = [(name, weight) for name, weight in condition_config.items() if weight > 0 and fits(name, num_frames)]
    if num_frames == 1 or not options:
        return "t2v"
    bounds = list(itertools.accumulate(weight for _, weight in options))
    return options[min(bisect.bisect(bounds, u * bounds[-1]), len(options) - 1)][0]


def fill_condition(
    latents: Tensor, names: Sequence[str], encode_span: Callable[[Span, list[int]], Tensor], causal: bool = True
) -> Tensor:
    """The condition [B, 1 + C, T, H, W] beside latents [B, C, T, H, W]: mask channel, then the given latents; else 0.

    names: a condition per sample. encode_span(span, samples) returns the span's latents [N, C, T', H, W] for the
    samples (positions in the batch) that have it; samples with a span in common are encoded together.
    """
    batch, channels, frames, height, width = latents.shape
    condition = latents.new_zeros(batch, 1 + channels, frames, height, width)
    if frames == 1:  # images: nothing is given
        return condition
    holders: dict[Span, list[int]] = {}
    for sample, name in enumerate(names):
        for span in condition_spans(name, causal):
            holders.setdefault(span, []).append(sample)
    for span in sorted(holders):  # heads before tails: the order in which a sample draws its noise
        samples = holders[span]
        encoded = encode_span(span, samples).to(condition)  # [N, C, T', H, W]
        where = span.slice(encoded.shape[2])
        rows = torch.tensor(samples, device=condition.device)
        condition[rows, :1, where] = 1
        condition[rows, 1:, where] = encoded
    return condition


def given_frames(video: Tensor, num_latent_frames: int, causal: bool) -> Tensor:
    """The frames of a clip [B, 3, T, H, W] that spans are taken from.

    Of an autoencoder that is not causal, whole blocks only: the tail counts from the last frame that the latents hold.
    """
    if causal:
        return video
    return video[:, :, : num_latent_frames * (video.shape[2] // num_latent_frames)]


def spans_of(condition_config: Mapping[str, float] | None, num_frames: int, causal: bool) -> list[Span]:
    """All spans that the conditions of a config may give of a clip of `num_frames`, heads before tails."""
    names = [name for name, weight in (condition_config or {}).items() if weight > 0 and fits(name, num_frames)]
    return sorted({span for name in names for span in condition_spans(name, causal)})


def build_condition(
    video: Tensor,
    latents: Tensor,
    names: Sequence[str],
    encode: Callable[[Tensor, list[int]], Tensor],
    causal: bool = True,
) -> Tensor:
    """The condition [B, 1 + C, T', H', W'] of training clips `video` [B, 3, T, H, W] with latents [B, C, T', H', W'].

    encode(frames [N, 3, t, H, W], samples) -> [N, C, t', H', W'], where `samples` are the frames' positions in the
    batch (for per-sample noise: `SampleRandom.select(samples).normal`).
    """
    video = given_frames(video, latents.shape[2], causal)

    def encode_span(span: Span, samples: list[int]) -> Tensor:
        return encode(span.of(video[samples]), samples)

    return fill_condition(latents, names, encode_span, causal)
