"""Classifier-free guidance with text and reference (spec 10).

Three velocities: `full` (prompt, reference), `no_text` (negative prompt, reference), `neither` (negative prompt, no
reference). Result: neither + image_scale * (no_text - neither) + text_scale * (full - no_text).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OSCILLATION_START = 10


class Branch(NamedTuple):
    """What one of the velocities is conditioned on."""

    text: bool
    reference: bool


FULL = Branch(text=True, reference=True)
NO_TEXT = Branch(text=False, reference=True)
NEITHER = Branch(text=False, reference=False)


def oscillate(scale: float, step: int, start: int = OSCILLATION_START) -> float:
    """`scale`, but 1 (no guidance) at every odd step from `start` on: sharp without over-saturation."""
    return 1.0 if step >= start and step % 2 == 1 else scale


def temporal_scale(scale: float, step: int, num_steps: int, num_frames: int) -> Tensor:
    """Reference guidance per latent frame [T] fp32: 1 at the first, rising to the last; the rise fades over the steps.

    The last frame's value is linspace(scale, 1, num_steps + 1)[step].
    """
    last = torch.linspace(scale, 1.0, num_steps + 1)[step].item()
    return torch.linspace(1.0, last, num_frames)


def needed_branches(
    text_scale: float, image_scale: float, has_reference: bool, same_text: bool = False
) -> tuple[Branch, ...]:
    """The branches to compute, `FULL` first: the result needs no other, or it equals one of them.

    Without a reference NO_TEXT and NEITHER are the same computation; NEITHER is left out. With the prompt as negative
    prompt (`same_text`) FULL and NO_TEXT are; NO_TEXT is left out. `image_scale` is the scalar before `temporal_scale`
    (which keeps 1 at 1).
    """
    if not has_reference or image_scale == 1.0:
        return (FULL,) if same_text or text_scale == 1.0 else (FULL, NO_TEXT)
    return (FULL, NEITHER) if same_text else (FULL, NO_TEXT, NEITHER)


def combine(velocities: dict[Branch, Tensor], text_scale: float, image_scale: float | Tensor) -> Tensor:
    """The guided velocity from those of `needed_branches`. All [B, ...]; a Tensor scale broadcasts against them."""
    full = velocities[FULL]
    if len(velocities) == 1:
        return full
    no_text = velocities.get(NO_TEXT, full)
    neither = velocities.get(NEITHER, no_text)
    return neither + image_scale * (no_text - neither) + text_scale * (full - no_text)
