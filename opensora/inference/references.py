"""The frames that a condition takes from a user's images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.common import get_logger
from opensora.data.probe import probe
from opensora.data.transforms import normalise
from opensora.data.video import read_clip
from opensora.diffusion.conditions import Span, condition_spans, fits
from opensora.inference.prompts import Prompt
from opensora.inference.size import SampleSize


def condition_type(cfg: Mapping[str, Any]) -> str:
    """The config's `cond_type`; with use_t2i2v a video starts from its image if nothing else is said."""
    return "i2v_head" if cfg["use_t2i2v"] and cfg["cond_type"] == "t2v" else cfg["cond_type"]


def span_source(references: Sequence[str], span: Span) -> str:
    """Of several references the first gives the head and the last the tail."""
    return references[-1] if span.tail else references[0]


def read_span(references: Sequence[str], span: Span, size: SampleSize) -> Tensor:
    """The span's frames [3, span.frames, H, W] in [-1, 1], scaled to cover the sample's size and cropped to its centre.

    A head is made of the first frames of its reference, a tail of the last.
    """
    path = span_source(references, span)
    start = probe(path).num_frames - span.frames if span.tail else 0
    frames = read_clip(path, np.arange(start, start + span.frames), size.height, size.width, "exact")
    return normalise(frames, torch.float32)


def check_references(
    prompts: Sequence[Prompt], cond_type: str, cond_embed: bool, causal: bool, size: SampleSize, drawn: bool = False
) -> None:
    """Whether `cond_type` can be given to every prompt; reads what it takes of each file once.

    Prompts without a reference are sampled from text alone, which is said, or with `drawn` from an image to be drawn.

    Raises:
        ValueError, FileNotFoundError: references without a use, or none at all; a clip too short for the condition, a
            file that is absent, unreadable or too short.
    """
    spans = condition_spans(cond_type, causal)
    if not spans:
        return
    if not cond_embed:
        raise ValueError(f"cond_type='{cond_type}' needs a model with cond_embed=True")
    if size.is_image or not fits(cond_type, size.num_frames):
        longest = max(span.frames for span in spans)
        raise ValueError(
            f"cond_type='{cond_type}' does not fit num_frames={size.num_frames}: give {max(longest, 5)} or more, "
            "or sample with --cond_type t2v"
        )
    without = sum(not prompt.references for prompt in prompts)
    if without == len(prompts) and not drawn:
        raise ValueError(f"cond_type='{cond_type}' needs a reference: --ref first.png, or a column 'ref'")
    if without and not drawn:
        get_logger().warning(f"{without} of {len(prompts)} prompts have no reference: sampled as t2v")
    given = [prompt.references for prompt in prompts if prompt.references]
    for path, span in dict.fromkeys((span_source(references, span), span) for references in given for span in spans):
        _check_source(path, span, cond_type, size)


def _check_source(path: str, span: Span, cond_type: str, size: SampleSize) -> None:
    try:
        found = probe(path).num_frames
        if found >= span.frames:
            read_span((path,), span, size)
    except ValueError as error:
        raise ValueError(f"ref {error}") from error
    if found < span.frames:
        raise ValueError(f"ref '{path}' has {found} frames, cond_type='{cond_type}' takes {span.frames} of it")
