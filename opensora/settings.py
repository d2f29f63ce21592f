"""Settings that training and inference share, and the rules among them."""

# ruff: noqa: RUF009 (`setting` makes a dataclass field)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opensora.checkpoint_folder import parse_folder_name
from opensora.common import DTYPES
from opensora.registry import AUTOENCODERS, nearest
from opensora.schema import ABSENT, setting

PLUGINS = ("zero1", "zero2", "hybrid")
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(kw_only=True)
class ModelBuilding:
    """What a model's builder takes beside the model's own arguments."""

    from_pretrained: str | list[str] | None = setting(
        None, "weights: a file, a checkpoint folder, a run folder (its newest checkpoint)", several=True
    )
    strict_load: bool = setting(ABSENT, legacy="loading is always strict but for embedders that a model may lack")
    grad_ckpt_settings: tuple[int, int] | None = setting(
        None, "the first so many double and single blocks are recomputed in the backward pass; None: all"
    )
    grad_ckpt_policy: Literal["full", "blocks", "attention"] = setting(
        "blocks",
        "full: recompute all blocks; blocks: those of grad_ckpt_settings; attention: of those, all but attention",
    )
    attention: Literal["sdpa", "flash_attn_2", "flash_attn_3"] = setting(
        "sdpa", "kernels of the attention: sdpa: PyTorch picks; flash_attn_2, flash_attn_3: those packages on CUDA"
    )
    compile: bool = setting(False, "compile each block (torch.compile): minutes at the start, then faster steps")


@dataclass(kw_only=True)
class PluginSettings:
    """ColossalAI's plugin. What is not given is the plugin's own default."""

    reduce_bucket_size_in_m: int = setting(ABSENT, "gradients are reduced in buckets of so many million elements")
    overlap_communication: bool = setting(ABSENT, "reduce gradients while the backward pass runs")
    overlap_allgather: bool = setting(ABSENT, "gather updated weights while the next forward pass runs")
    zero_stage: int = setting(ABSENT, "hybrid: ZeRO stage of the data-parallel ranks")
    zero_bucket_size_in_m: int = setting(ABSENT, "hybrid: as reduce_bucket_size_in_m")
    tp_size: int = setting(ABSENT, "hybrid: ranks that split each layer (tensor parallel)")
    pp_size: int = setting(ABSENT, "hybrid: ranks that split the layers (pipeline parallel)")
    sp_size: int = setting(ABSENT, "hybrid: ranks that split each sequence (sequence parallel)")
    enable_sequence_parallelism: bool = setting(ABSENT, "hybrid: split sequences at all")
    sequence_parallelism_mode: Literal["ring_attn", "all_to_all"] | None = setting(
        ABSENT, "hybrid: how attention sees the whole sequence"
    )
    static_graph: bool = setting(ABSENT, legacy="what every step runs is not looked at")


class ParallelSizes(NamedTuple):
    """How many ranks share a model (`tensor`), and how many a sequence (`sequence`), in `mode`."""

    tensor: int = 1
    sequence: int = 1
    mode: str = "all_to_all"


def parallel_sizes(cfg: Mapping[str, Any], where: str = "plugin") -> ParallelSizes:
    """What "plugin" or "plugin_ae", and its settings, ask for."""
    if cfg[where] != "hybrid":
        return ParallelSizes()
    settings = cfg[where.replace("plugin", "plugin_config")]
    mode = settings.get("sequence_parallelism_mode") or ParallelSizes().mode
    return ParallelSizes(settings.get("tp_size", 1), settings.get("sp_size", 1), mode)


SIZES = ("tp_size", "pp_size", "sp_size")
HYBRID_ONLY = (
    *SIZES,
    "zero_stage",
    "zero_bucket_size_in_m",
    "enable_sequence_parallelism",
    "sequence_parallelism_mode",
    "static_graph",
)


# ------------------------------------------------------------------------------------------------------- rules


def check_at_least(cfg: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """ValueError for the first setting (dotted name) below its least value; None, where it is legal, is fine."""
    for name, smallest in least.items():
        value = get(cfg, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value} must be at least {smallest}")


def check_at_most(cfg: Mapping[str, Any], most: Mapping[str, float]) -> None:
    """As `check_at_least`, of the other end."""
    for name, largest in most.items():
        value = get(cfg, name)
        if value is not None and value > largest:
            raise ValueError(f"{name}={value} must be at most {largest}")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype='{dtype}' is unknown{nearest(dtype, DTYPES)}; one of {', '.join(DTYPES)}")


def get(cfg: Mapping[str, Any], name: str) -> Any:
    """The setting of a dotted name; None where there is none."""
    for key in name.split("."):
        cfg = cfg.get(key) if hasattr(cfg, "get") else None
    return cfg


def check_timeout(seconds: float) -> None:
    """Of `dist_timeout`: what torch takes as one."""
    longest = 10**7  # four months
    if not 0 < seconds <= longest:
        raise ValueError(f"dist_timeout={seconds:g} must be above 0 and at most {longest} seconds")


def check_plugin(cfg: Mapping[str, Any], world_size: int, where: str = "plugin") -> None:
    """The plugin is known, its settings belong to it, its groups divide the job and the model's heads.

    Args:
        cfg: the whole config.
        world_size: processes of the job.
        where: "plugin", or "plugin_ae" for the autoencoder's.
    """
    plugin, settings = cfg[where], cfg[where.replace("plugin", "plugin_config")]
    if plugin is None:
        return
    config_name = where.replace("plugin", "plugin_config")
    if plugin not in PLUGINS:
        raise ValueError(f"{where}='{plugin}' is unknown: one of {', '.join(PLUGINS)}")
    misplaced = [key for key in HYBRID_ONLY if key in settings]
    if plugin != "hybrid" and misplaced:
        kept = {key: value for key, value in settings.items() if key not in HYBRID_ONLY}
        raise ValueError(
            f"{config_name}.{misplaced[0]}={settings[misplaced[0]]!r} needs {where}='hybrid', not '{plugin}': "
            f'set --{config_name} "{kept}"'
        )
    for key in SIZES:
        if settings.get(key, 1) < 1:
            raise ValueError(f"{config_name}.{key}={settings[key]} must be at least 1")
    group = math.prod(settings.get(key, 1) for key in SIZES)
    if world_size % group:
        sizes = " * ".join(f"{key}={settings.get(key, 1)}" for key in SIZES)
        raise ValueError(
            f"{config_name}: {sizes} = {group} does not divide the job's {world_size} processes: "
            f"start a multiple of {group} (--nproc_per_node) or change the sizes"
        )
    if settings.get("pp_size", 1) > 1:
        raise ValueError(
            f"{config_name}.pp_size={settings['pp_size']}: there is no pipeline parallelism: set it to 1, and raise "
            "tp_size or sp_size"
        )
    if settings.get("sp_size", 1) > 1 and not settings.get("enable_sequence_parallelism", True):
        raise ValueError(
            f"{config_name}.sp_size={settings['sp_size']} contradicts {config_name}.enable_sequence_parallelism=False: "
            "set the size to 1, or that to True"
        )
    if settings.get("zero_stage", 1) not in (0, 1, 2):
        raise ValueError(f"{config_name}.zero_stage={settings['zero_stage']} must be 0, 1 or 2")
    if where == "plugin" and settings.get("overlap_allgather") and cfg["model"].get("compile"):
        raise ValueError(
            f"{config_name}.overlap_allgather=True: a compiled model does not wait for the weights that are gathered: "
            f"set --{config_name}.overlap_allgather False or --model.compile False"
        )
    if plugin == "hybrid" and where == "plugin":
        check_parts(cfg["model"], parallel_sizes(cfg))


def check_parts(model: Mapping[str, Any], sizes: ParallelSizes, where: str = "model") -> None:
    """The heads and features of a model can be divided."""
    heads, tensor, sequence = model["num_heads"], sizes.tensor, sizes.sequence
    if heads % tensor:
        raise ValueError(f"plugin_config.tp_size={tensor} does not divide {where}.num_heads={heads}")
    features = int(model["hidden_size"] * model["mlp_ratio"])
    if features % tensor:
        raise ValueError(
            f"plugin_config.tp_size={tensor} does not divide {where}.hidden_size * {where}.mlp_ratio = {features}"
        )
    if sizes.mode == "all_to_all" and heads // tensor % sequence:
        raise ValueError(
            f"plugin_config.sp_size={sequence} does not divide {where}.num_heads={heads} (over tp_size={tensor}): "
            "all_to_all splits heads; use sequence_parallelism_mode='ring_attn' or another sp_size"
        )


def check_shardformer(cfg: Mapping[str, Any]) -> None:
    if cfg["clip"].get("shardformer"):
        raise ValueError("clip.shardformer=True: Shardformer is for T5 alone here: set --clip.shardformer False")


def check_model(model: Mapping[str, Any], where: str = "model") -> None:
    """Sizes are positive, and the rotary dimensions add up to a head's."""
    sizes = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "mlp_ratio", "patch_size")
    for key in (*sizes, "theta"):
        if model.get(key, 1) <= 0:
            raise ValueError(f"{where}.{key}={model[key]} must be above 0")
    for key in ("depth", "depth_single_blocks"):
        if model.get(key, 0) < 0:
            raise ValueError(f"{where}.{key}={model[key]} must be at least 0")
    hidden, heads, axes = model["hidden_size"], model["num_heads"], model["axes_dim"]
    if hidden % heads:
        raise ValueError(f"{where}.hidden_size={hidden} is no multiple of {where}.num_heads={heads}")
    if len(axes) != 3 or any(dim < 0 or dim % 2 for dim in axes):
        raise ValueError(f"{where}.axes_dim={list(axes)} must be three even numbers (time, height, width)")
    if sum(axes) != hidden // heads:
        raise ValueError(
            f"{where}.axes_dim={list(axes)} adds up to {sum(axes)}, but a head has "
            f"hidden_size / num_heads = {hidden} / {heads} = {hidden // heads} dimensions"
        )
    if any(count < 0 for count in model.get("grad_ckpt_settings") or ()):
        raise ValueError(f"{where}.grad_ckpt_settings={model['grad_ckpt_settings']} must be counts of blocks")


def check_latents(model: Mapping[str, Any], ae: Mapping[str, Any], where: str = "model", ae_where: str = "ae") -> None:
    """A token of the model holds a patch of the autoencoder's latents, where both are known before it is loaded."""
    channels, patch = latent_channels(ae), model.get("patch_size", 2)
    if channels is not None and model["in_channels"] != channels * patch**2:
        raise ValueError(
            f"{where}.in_channels={model['in_channels']} does not fit {ae_where}: {channels} latent channels * "
            f"patch_size {patch}² = {channels * patch**2}"
        )


def latent_channels(ae: Mapping[str, Any]) -> int | None:
    """The latent channels that an autoencoder's settings or their defaults tell; None if only its file does."""
    parameters = AUTOENCODERS.parameters(ae["type"])
    for key in ("latent_channels", "z_channels"):
        if key in parameters:
            value = ae.get(key, parameters[key].default)
            return value if isinstance(value, int) else None
    return None


def check_frames(num_frames: int, ae: Mapping[str, Any], where: str) -> None:
    """ValueError unless clips of `num_frames` frames become whole latent frames; single frames always do.

    A causal autoencoder keeps the first frame apart: 5, 9, 13, ... at a compression of 4.
    """
    component = AUTOENCODERS.get(ae["type"])
    compression, first = component.temporal_compression, int(component.is_causal)
    rest = (num_frames - first) % compression
    if num_frames < 1 or (num_frames > 1 and rest):
        near = sorted({max(1, num_frames - rest), max(1, num_frames - rest + compression)})
        raise ValueError(
            f"{where}: {num_frames} frames do not fit ae.type='{ae['type']}', which takes "
            f"{compression}n{' + 1' if first else ''} frames or one: use {' or '.join(map(str, near))}"
        )


# ------------------------------------------------------------------------------------- what this version has not


def raise_unavailable(reasons: Iterable[str]) -> None:
    """One ValueError for all the reasons."""
    reasons = list(reasons)
    if reasons:
        raise ValueError("; ".join(reasons))


# ------------------------------------------------------------------------------------------------------- paths


def is_hub_name(path: str) -> bool:
    """Whether `path` is a repository of the Hugging Face hub ("google/t5-v1_1-xxl"), or a folder or file of one."""
    parts = path.split("/")
    is_pattern, is_checkpoint = any(c in path for c in "*?["), parse_folder_name(path) is not None
    if path.startswith((".", "/", "~")) or "" in parts or is_pattern or is_checkpoint or Path(parts[0]).is_dir():
        return False
    return len(parts) >= (3 if Path(path).suffix in WEIGHT_FILES else 2)


def check_weights(cfg: Mapping[str, Any], sections: Iterable[str]) -> None:
    """FileNotFoundError for the first component whose `from_pretrained` names a place that does not exist.

    Patterns and lists are checkpoints to choose from: `checkpoint_folder.resolve_checkpoint` looks for them.
    """
    for section in sections:
        path = get(cfg, f"{section}.from_pretrained")
        if not isinstance(path, str) or any(c in path for c in "*?["):
            continue
        if not is_hub_name(path) and not Path(path).expanduser().exists():
            raise FileNotFoundError(
                f"{section}.from_pretrained='{path}' does not exist: see ckpts/README.md for how to get the weights, "
                f"or set --{section}.from-pretrained PATH"
            )


TEXT_INPUTS = {"t5": "context_in_dim", "clip": "vec_in_dim"}  # the model's setting for the width of each encoder


def check_text_widths(cfg: Mapping[str, Any], width_of: Callable[[str], int]) -> None:
    """The text encoders are as wide as the model takes them, where they lie on this machine.

    width_of: the width of the encoder in a folder.
    """
    for section in TEXT_INPUTS:
        path = cfg[section]["from_pretrained"]
        if not is_hub_name(path):
            check_text_width(cfg, section, width_of(path))


def check_text_width(cfg: Mapping[str, Any], section: str, width: int) -> None:
    """ValueError unless the text encoder of `section` is as wide as the model takes it."""
    key = TEXT_INPUTS[section]
    if width != cfg["model"][key]:
        raise ValueError(
            f"model.{key}={cfg['model'][key]}, but {section}.from_pretrained='{cfg[section]['from_pretrained']}' is "
            f"{width} wide: set --model.{key.replace('_', '-')} {width}, or the encoder that the model was made for"
        )
