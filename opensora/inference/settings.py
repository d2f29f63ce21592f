"""What can be set for sampling, and the rules among the settings."""

# ruff: noqa: RUF009 (`setting` makes a dataclass field)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import opensora.models  # noqa: F401  registers the components
from opensora.common import to_torch_dtype
from opensora.diffusion.conditions import check_condition, condition_spans
from opensora.inference.prompts import check_text
from opensora.inference.references import condition_type
from opensora.inference.refine import DYNAMIC, endpoint_of
from opensora.inference.sampler import SamplerOptions
from opensora.inference.size import first_frame_size, sample_size
from opensora.models.requirements import missing_requirements
from opensora.models.text import text_width
from opensora.registry import AUTOENCODERS, DATASETS, MODELS, TEXT_ENCODERS
from opensora.schema import ABSENT, setting
from opensora.settings import (
    TEXT_INPUTS,
    ModelBuilding,
    PluginSettings,
    check_at_least,
    check_at_most,
    check_dtype,
    check_frames,
    check_latents,
    check_model,
    check_parts,
    check_plugin,
    check_shardformer,
    check_text_widths,
    check_timeout,
    check_weights,
    get,
    parallel_sizes,
    raise_unavailable,
)


@dataclass(kw_only=True)
class SamplingOption:
    """Size and schedule of what is drawn (spec 10)."""

    resolution: str | None = setting(None, "256px, 768px, ...: the pixel budget")
    aspect_ratio: str | None = setting(None, "width:height, e.g. 16:9")
    height: int | None = setting(None, "pixels, in place of resolution and aspect_ratio")
    width: int | None = setting(None, "pixels, in place of resolution and aspect_ratio")
    num_frames: int = setting(1, "4n + 1; 1 draws an image")
    num_steps: int = setting(50, "Euler steps")
    guidance: float = setting(4.0, "scale of the text's guidance; 1 is none")
    guidance_img: float | None = setting(None, "scale of the reference's guidance; 1 is none")
    text_osci: bool = setting(False, "no text guidance at every odd step from the 10th on")
    image_osci: bool = setting(False, "no reference guidance at every odd step from the 10th on")
    scale_temporal_osci: bool = setting(False, "let the reference's guidance rise along the video")
    shift: bool = setting(True, "shift the schedule towards noise, by as much as the size asks for")
    flow_shift: float | None = setting(None, "or by this much")
    step_cache: float | None = setting(
        None, "use a velocity again while its estimated relative change is below this, e.g. 0.05; None: never"
    )
    method: str = setting("i2v", "i2v guides with two or three velocities a step; distill tells the model the scale")
    temporal_reduction: int = setting(ABSENT, legacy="the autoencoder itself says how many frames a latent frame has")
    is_causal_vae: bool = setting(ABSENT, legacy="the autoencoder itself says whether it is causal")
    seed: int | None = setting(None, "of the noise; None: seed")


@dataclass(kw_only=True)
class InferenceSettings:
    """All settings of a sampling run."""

    # ---- the parts
    model: dict = setting(doc="the transformer", registry=MODELS, also=ModelBuilding)
    ae: dict = setting(doc="the video autoencoder", registry=AUTOENCODERS)
    t5: dict = setting(doc="encoder of the text's tokens", registry=TEXT_ENCODERS)
    clip: dict = setting(doc="encoder of the text's vector", registry=TEXT_ENCODERS)
    use_ema: bool = setting(False, "take the checkpoint's averaged weights")
    lora: str | list[str] | None = setting(
        None,
        "adapters on model.from_pretrained: a checkpoint of a run with lora_config, or a folder of peft",
        several=True,
    )
    lora_scale: float = setting(1.0, "how strongly adapters are applied: 0 not at all, 1 as they were trained")

    # ---- what is drawn
    prompt: str | list[str] | None = setting(None, "what to show")
    ref: str | list[str] | None = setting(
        None, "with cond_type: the image or video that is given; head and tail as 'a.png;b.png'"
    )
    neg: str = setting("", "what not to show, for rows without a negative prompt of their own")
    cond_type: str = setting("t2v", "what is given beside the text: t2v, i2v_head, i2v_tail, i2v_loop, v2v_...")
    dataset: dict = setting({"type": "text"}, "prompts from a file: --dataset.data-path FILE", registry=DATASETS)
    start_index: int = setting(0, "first row of the table")
    end_index: int | None = setting(None, "row before which to stop")
    num_sample: int = setting(1, "samples of each prompt")
    batch_size: int = setting(1, "samples that are drawn together")
    sampling_option: SamplingOption = setting(doc="size and schedule")
    ae_spatial_compression: int = setting(
        ABSENT, legacy="the autoencoder and the model's patches say what sizes are multiples of"
    )
    motion_score: str | int | float | None = setting(
        None, "appended to the prompt: how much moves, 1 to 7; dynamic: a language model rates each prompt"
    )
    seed: int = setting(42, "of the first sample's noise")
    refine_prompt: bool = setting(
        False,
        "let a language model rewrite the prompts: OPENAI_API_KEY, or OPENAI_BASE_URL of an endpoint like OpenAI's",
    )
    refine_model: str = setting("gpt-4o", "the language model's name at that endpoint")

    # ---- text to image to video
    use_t2i2v: bool = setting(False, "draw the first frame with an image model, then the video from it")
    img_flux: dict | None = setting(None, "the image model", registry=MODELS, also=ModelBuilding)
    img_flux_ae: dict | None = setting(None, "its autoencoder", registry=AUTOENCODERS)
    img_resolution: str = setting("768px", "of that frame")

    # ---- what it leaves
    save_dir: str = setting("samples", "folder of the samples")
    fps_save: int | float = setting(24, "frames a second of the videos")
    crf: int = setting(18, "how hard videos are compressed: 0 keeps every pixel, 18 looks the same, 51 is the smallest")

    # ---- precision, memory, devices
    dtype: str = setting("bf16", "what the models compute in: bf16, fp16 or fp32")
    offload: bool = setting(False, "each model is on the device only while it computes, and waits in host memory")
    dist_timeout: float = setting(1800.0, "seconds after which a rank that waits for the others gives up")
    plugin: str | None = setting(
        None, "hybrid: ranks share a model, its layers (tp_size) and tokens (sp_size); None: each has its own"
    )
    plugin_config: PluginSettings = setting(doc="arguments of the plugin")
    plugin_ae: str | None = setting(
        None, "hybrid: ranks that share a model share the autoencoder's samples and tiles too"
    )
    plugin_config_ae: PluginSettings = setting(doc="arguments of that plugin")

    # Settings that stand for another one: giving either is the same.
    aliases: ClassVar[dict[str, str]] = {
        "ckpt_path": "model.from_pretrained",
        "compile": "model.compile",
        **{
            name: f"sampling_option.{name}"
            for name in ("resolution", "aspect_ratio", "num_frames", "num_steps", "guidance", "guidance_img")
        },
    }


LEAST = {
    "batch_size": 1,
    "crf": 0,
    "end_index": 0,
    "fps_save": 1,
    "lora_scale": 0,
    "num_sample": 1,
    "sampling_option.guidance": 0,
    "sampling_option.guidance_img": 0,
    "sampling_option.height": 1,
    "sampling_option.num_frames": 1,
    "sampling_option.num_steps": 1,
    "sampling_option.seed": 0,
    "sampling_option.step_cache": 0,
    "sampling_option.width": 1,
    "seed": 0,
    "start_index": 0,
}


MOST = {"crf": 51, "sampling_option.seed": 2**63 - 1, "seed": 2**63 - 1}


def validate(cfg: Mapping[str, Any], world_size: int) -> None:
    """The rules among settings; touches no file and no device.

    Args:
        cfg: of `load_config(argv, InferenceSettings)`.
        world_size: processes of the job.

    Raises:
        ValueError: the first rule that is broken: the setting, its value, what it must be.
    """
    check_at_least(cfg, LEAST)
    check_at_most(cfg, MOST)
    check_dtype(cfg["dtype"])
    check_model(cfg["model"])
    check_latents(cfg["model"], cfg["ae"])
    check_plugin(cfg, world_size)
    check_timeout(cfg["dist_timeout"])
    check_plugin(cfg, world_size, "plugin_ae")
    _check_autoencoder_ranks(cfg)
    check_shardformer(cfg)
    _check_size(cfg)
    _check_prompts(cfg)
    if cfg["use_t2i2v"]:
        _check_image_model(cfg)


def _check_autoencoder_ranks(cfg: Mapping[str, Any]) -> None:
    """The ranks that share an autoencoder are those that have the same samples."""
    model, autoencoder = (prod(parallel_sizes(cfg, where)[:2]) for where in ("plugin", "plugin_ae"))
    if autoencoder not in (1, model):
        raise ValueError(
            f"plugin_config_ae: tp_size * sp_size = {autoencoder} ranks share the autoencoder, and plugin_config lets "
            f"{model} share a model: make both the same, or set --plugin_ae none"
        )


def _check_size(cfg: Mapping[str, Any]) -> None:
    option = cfg["sampling_option"]
    SamplerOptions.from_config(option)
    if option["method"] == "distill" and not cfg["model"].get("guidance_embed") and option["guidance"] != 1:
        raise ValueError(
            f"sampling_option.guidance={option['guidance']} is told to nobody: with method='distill' the model guides "
            "itself, and one without guidance_embed takes no scale: set --guidance 1, or --sampling_option.method i2v"
        )
    check_frames(option["num_frames"], cfg["ae"], "sampling_option.num_frames")
    sample_size(cfg)


def _check_prompts(cfg: Mapping[str, Any]) -> None:
    if cfg["prompt"] is None and get(cfg, "dataset.data_path") is None:
        raise ValueError('nothing to draw: give --prompt "TEXT", or --dataset.data-path FILE (csv or txt)')
    check_condition(cfg["cond_type"], "cond_type")
    if cfg["cond_type"] != "t2v" and not cfg["model"].get("cond_embed", False):
        raise ValueError(
            f"cond_type='{cfg['cond_type']}' needs a model that takes conditions: set --model.cond-embed True"
        )
    if cfg["cond_type"] != "t2v" and cfg["prompt"] is not None and cfg["ref"] is None and not cfg["use_t2i2v"]:
        raise ValueError(f"cond_type='{cfg['cond_type']}' needs a reference: set --ref FILE, or --cond_type t2v")
    check_text("neg", cfg["neg"])
    _check_motion_score(cfg["motion_score"])


def _check_motion_score(score: Any) -> None:
    if score is not None and score != DYNAMIC:
        try:
            within = 1 <= float(score) <= 7
        except ValueError:
            within = False
        if not within:
            raise ValueError(f"motion_score='{score}' must be a number, 1 to 7, or '{DYNAMIC}'")


def _check_image_model(cfg: Mapping[str, Any]) -> None:
    for section in ("img_flux", "img_flux_ae"):
        if cfg[section] is None:
            raise ValueError(f"use_t2i2v=True needs {section}: build on configs/diffusion/inference/plugins/t2i2v.py")
    check_model(cfg["img_flux"], "img_flux")
    check_parts(cfg["img_flux"], parallel_sizes(cfg), "img_flux")
    check_latents(cfg["img_flux"], cfg["img_flux_ae"], "img_flux", "img_flux_ae")
    for key in TEXT_INPUTS.values():
        if cfg["img_flux"][key] != cfg["model"][key]:
            raise ValueError(
                f"img_flux.{key}={cfg['img_flux'][key]} and model.{key}={cfg['model'][key]} must be equal: both models "
                "read the same embeddings"
            )
    if cfg["sampling_option"]["num_frames"] == 1:
        raise ValueError(
            "use_t2i2v=True draws videos, and num_frames=1 is an image: take "
            "configs/diffusion/inference/t2i_768px.py for images, or --use-t2i2v False"
        )
    if not cfg["model"].get("cond_embed", False):
        raise ValueError("use_t2i2v=True needs a model that takes conditions: set --model.cond-embed True")
    spans = condition_spans(condition_type(cfg))
    if any(span.frames > 1 for span in spans):
        raise ValueError(f"use_t2i2v=True draws one frame, and cond_type='{cfg['cond_type']}' takes more: use i2v_head")
    _check_size_of_first_frame(cfg)


def _check_size_of_first_frame(cfg: Mapping[str, Any]) -> None:
    try:
        first_frame_size(cfg, sample_size(cfg))
    except ValueError as error:
        raise ValueError(f"img_resolution='{cfg['img_resolution']}': {error}") from None


def require_available(cfg: Mapping[str, Any]) -> None:
    """ValueError that says which of the settings need what this version or this machine has not, and what to do."""
    reasons = []
    for section in ("model", "img_flux") if cfg["use_t2i2v"] else ("model",):
        reasons += missing_requirements(cfg[section], to_torch_dtype(cfg["dtype"]), section)
    raise_unavailable(reasons)
    endpoint_of(cfg)


def check_paths(cfg: Mapping[str, Any]) -> None:
    """The files and folders that the config names exist (FileNotFoundError) and fit the model (ValueError)."""
    check_weights(cfg, ("model", "ae", "t5", "clip", *(("img_flux", "img_flux_ae") if cfg["use_t2i2v"] else ())))
    check_text_widths(cfg, text_width)
