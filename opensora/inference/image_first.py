"""Text to image to video: an image model (flux) draws the frame that a video then starts from (spec 10)."""

from __future__ import annotations

from pathlib import Path

import torch

from opensora.common import to_torch_dtype
from opensora.inference.division import UNDIVIDED, Division
from opensora.inference.phases import PhaseMeter
from opensora.inference.pipeline import Pipeline, TextEncoder, build_autoencoder, build_transformer, home_of
from opensora.inference.sampler import SamplerOptions
from opensora.inference.size import SampleSize

GUIDANCE = 4.0
FOLDER = "generated_condition"  # beside the videos, as the reference calls it


def image_pipeline(
    cfg,
    size: SampleSize,
    texts: tuple[TextEncoder, TextEncoder],
    device: torch.device,
    meter: PhaseMeter,
    division: Division = UNDIVIDED,
) -> Pipeline:
    """What draws first frames: the steps and the schedule of `sampling_option`, guidance 4, which a distilled model is
    told and another is guided with."""
    dtype, home, option = to_torch_dtype(cfg.dtype), home_of(cfg, device), cfg.sampling_option
    model = build_transformer(cfg.img_flux, "img_flux", dtype, home, division)
    return Pipeline(
        model,
        build_autoencoder(cfg.img_flux_ae, "img_flux_ae", dtype, home, division),
        *texts,
        options=SamplerOptions(
            num_steps=option.num_steps,
            guidance=GUIDANCE,
            shift=option.get("shift", True),
            flow_shift=option.get("flow_shift"),
            step_cache=option.get("step_cache"),
            method="distill" if model.guidance_embed else "i2v",
        ),
        size=size,
        device=device,
        dtype=dtype,
        offload=cfg.offload,
        meter=meter,
        division=division,
    )


def image_path(sample: Path) -> Path:
    """Where the first frame of the video `sample` is kept."""
    return sample.parent / FOLDER / f"{sample.stem}.png"
