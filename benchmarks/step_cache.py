"""Step caching: how far samples with `sampling_option.step_cache` are from those without, and what it saves.

python benchmarks/step_cache.py --model.from_pretrained outputs/shapes

The config is by default that of the demo; what this script does not know overrides it. The prompts are sampled with the
same noise without the cache, then at each threshold. "error" is |x - x'| / |x'| of the final latents (means of absolute
values, median and largest of the samples), "psnr" of the decoded frames in dB, "reused" the share of model calls left
out. For scale, "fewer steps" does without the cache what each threshold has left of the steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.config import load_config  # noqa: E402 - the repository need not be installed
from opensora.diffusion.random import derive_seed  # noqa: E402
from opensora.inference.pipeline import Pipeline, Request  # noqa: E402
from opensora.inference.plan import locate_weights, model_text  # noqa: E402
from opensora.inference.sampler import SamplerOptions  # noqa: E402
from opensora.inference.settings import InferenceSettings  # noqa: E402
from opensora.inference.size import sample_size  # noqa: E402

CONFIG = str(ROOT / "configs/diffusion/inference/shapes.py")
COLOURS, FORMS, WAYS = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle"), ("left", "right")
PROMPTS = [f"a {colour} {form} moving {way}" for colour in COLOURS for form in FORMS for way in WAYS]


def sample(pipeline: Pipeline, requests: list[Request], **options: float | int | None) -> tuple[Tensor, dict]:
    """Latents [B, C, T, H, W], and what they took."""
    sampler = pipeline.sampler
    sampler.options = replace(sampler.options, **options)
    start = time.perf_counter()
    latents = pipeline.sample_latents(requests)
    if latents.is_cuda:
        torch.cuda.synchronize()
    return latents, {"seconds": round(time.perf_counter() - start, 2), "reused": round(sampler.reused, 3)}


def compare(pipeline: Pipeline, latents: Tensor, expected: Tensor) -> dict[str, float]:
    errors = (latents - expected).abs().mean(dim=(1, 2, 3, 4)) / expected.abs().mean(dim=(1, 2, 3, 4))  # [B]
    pixels = [pipeline.autoencoder.decode(x.to(pipeline.dtype)).clamp(-1, 1).float() for x in (latents, expected)]
    mse = (pixels[0] - pixels[1]).square().mean(dim=(1, 2, 3, 4))  # [B]; the range is 2
    psnr = 10 * torch.log10(4 / mse.clamp(min=1e-12))
    figures = {"error": errors.median(), "error_max": errors.max(), "psnr": psnr.median(), "psnr_min": psnr.min()}
    return {name: round(value.item(), 4) for name, value in figures.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    arguments, overrides = parser.parse_known_args(argv)
    cfg = load_config([arguments.config, "--prompt", "none", *overrides], InferenceSettings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = sample_size(cfg)
    pipeline = Pipeline.from_config(cfg, size, *locate_weights(cfg), device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(arguments.samples)]
    texts = [model_text(prompt, size, cfg.fps_save, cfg.motion_score) for prompt in prompts]
    requests = [Request(text, derive_seed(cfg.seed, i, 0)) for i, text in enumerate(texts)]
    steps = SamplerOptions.from_config(cfg.sampling_option).num_steps

    sample(pipeline, requests[:1], num_steps=2)  # warms up
    expected, without = sample(pipeline, requests, num_steps=steps)
    rows = [{"step_cache": None, **without}]
    for threshold in arguments.thresholds:
        latents, took = sample(pipeline, requests, num_steps=steps, step_cache=threshold)
        left = max(1, round(steps * (1 - took["reused"])))
        fewer, fewer_took = sample(pipeline, requests, num_steps=left, step_cache=None)
        row = {"step_cache": threshold, **took, **compare(pipeline, latents, expected)}
        row["fewer_steps"] = {"steps": left, **fewer_took, **compare(pipeline, fewer, expected)}
        rows.append(row)
        print(row, flush=True)
    machine = describe_machine("torch", device=device.type)
    print(json.dumps({"samples": len(requests), "steps": steps, "rows": rows, **machine}))


if __name__ == "__main__":
    main(sys.argv[1:])
