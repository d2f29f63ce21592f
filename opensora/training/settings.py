"""What can be set for training, and the rules among the settings."""

# ruff: noqa: RUF009 (`setting` makes a dataclass field)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import opensora.data.loader
import opensora.models  # noqa: F401  registers the components
from opensora.common import to_torch_dtype
from opensora.data.aspect import resolution_sizes
from opensora.data.shards import find_shards
from opensora.diffusion.conditions import check_condition_config
from opensora.inference.sampler import SamplerOptions
from opensora.inference.settings import SamplingOption
from opensora.models.lora import check_targets, targets_of
from opensora.models.requirements import missing_requirements
from opensora.models.text import text_width
from opensora.registry import AUTOENCODERS, DATASETS, MODELS, TEXT_ENCODERS
from opensora.schema import ABSENT, setting
from opensora.settings import (
    ModelBuilding,
    PluginSettings,
    check_at_least,
    check_at_most,
    check_dtype,
    check_frames,
    check_latents,
    check_model,
    check_plugin,
    check_shardformer,
    check_text_widths,
    check_timeout,
    check_weights,
    get,
    raise_unavailable,
)
from opensora.training.optim import OptimizerRegistry, takes_weight_decay
from opensora.training.prompt_samples import eval_size, read_prompts

TABLE_SUFFIXES = (".csv", ".parquet")


OPTIMIZERS = OptimizerRegistry()


@dataclass(kw_only=True)
class OptimizerSettings:
    """What `optim` takes beside the arguments of the optimizer that `cls` names."""

    lr: float = setting(doc="learning rate")
    no_decay_norms_and_biases: bool = setting(ABSENT, "leave vectors (scales of norms, biases) out of the weight decay")
    adamw_mode: bool = setting(ABSENT, legacy="weight decay is always decoupled from the gradient")


@dataclass(kw_only=True)
class DropoutRatio:
    """Probability that a sample's text is replaced by the empty one, for each encoder on its own."""

    t5: float = setting(0.0, "of the T5 tokens")
    clip: float = setting(0.0, "of the CLIP vector")


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters, with the names and defaults of peft's LoraConfig."""

    r: int = setting(8, "rank of the adapters")
    lora_alpha: int = setting(8, "their scale is lora_alpha / r")
    lora_dropout: float = setting(0.0, "probability that an adapter's input is dropped")
    target_modules: list[str] | None = setting(
        None, "ends of the names of the linear layers that get one; None: all into and out of attention"
    )
    use_rslora: bool = setting(False, "the scale is lora_alpha / sqrt(r)")
    init_lora_weights: bool | Literal["gaussian"] = setting(True, "True: uniform, as linear layers are; or gaussian")


@dataclass(kw_only=True)
class EvalOption(SamplingOption):
    """How samples are drawn while training: as `sampling_option` at inference, but for the size of the data."""

    resolution: str | None = setting(None, "256px, 768px, ...: the pixel budget; None: the lowest of bucket_config")
    aspect_ratio: str | None = setting("16:9", "width:height")
    num_frames: int | None = setting(None, "4n + 1; 1 draws an image; None: the most that bucket_config has there")


@dataclass(kw_only=True)
class TrainSettings:
    """All settings of a training run."""

    # ---- what is trained, and beside which frozen parts
    model: dict = setting(doc="the transformer", registry=MODELS, also=ModelBuilding)
    ae: dict = setting(doc="the video autoencoder", registry=AUTOENCODERS)
    t5: dict = setting(doc="encoder of the text's tokens", registry=TEXT_ENCODERS)
    clip: dict = setting(doc="encoder of the text's vector", registry=TEXT_ENCODERS)
    dropout_ratio: DropoutRatio = setting(doc="text dropout by encoder, for classifier-free guidance")
    condition_config: dict[str, float] | None = setting(
        None, "weight of each condition (t2v, i2v_head, ...); None trains text-to-video only"
    )
    is_causal_vae: bool = setting(ABSENT, legacy="the autoencoder itself says whether it is causal")

    # ---- data
    dataset: dict = setting(doc="the table of videos and how it is read", registry=DATASETS)
    bucket_config: dict[str, dict[int, tuple[float | tuple[float, float], int]]] = setting(
        doc="{resolution: {frames: (probability, samples per batch)}}"
    )
    ae_spatial_compression: int = setting(
        16, "frame sizes are multiples of it: the autoencoder's 8 times the patch's 2"
    )
    num_workers: int = setting(4, "processes that decode, per rank; 0 decodes in the trainer")
    prefetch_factor: int | None = setting(2, "batches that each of them prepares ahead")
    pin_memory_cache_pre_alloc_numels: list[int] | None = setting(
        None, "elements of page-locked buffers for batches, allocated at the start; None: when a batch needs them"
    )
    cached_video: str | None = setting(
        None, "folder of scripts/cnv/cache.py: take latents from it, not from videos and the autoencoder"
    )
    cached_text: str | None = setting(
        None, "folder of scripts/cnv/cache.py: take text embeddings from it, not from the encoders"
    )
    num_bucket_build_workers: int = setting(ABSENT, legacy="buckets are assigned in one vectorised pass")

    # ---- optimization
    optim: dict = setting(
        {"cls": "HybridAdam", "lr": 5e-5, "eps": 1e-15, "weight_decay": 0.0},
        "the optimizer and its arguments",
        registry=OPTIMIZERS,
        selector="cls",
        also=OptimizerSettings,
    )
    lr: float | None = setting(None, "stands for optim.lr")
    eps: float | None = setting(None, "stands for optim.eps")
    warmup_steps: int | None = setting(None, "updates over which the learning rate rises from 1e-6")
    use_cosine_scheduler: bool = setting(False, "let the learning rate fall to 0 at the end of the run")
    grad_clip: float | None = setting(1.0, "largest norm of the whole gradient; 0 does not clip")
    accumulation_steps: int = setting(1, "micro-batches of a rank in one update")
    max_skipped_in_row: int = setting(5, "stop when so many updates in a row had no finite loss or gradient")
    skip_spikes: float | None = setting(
        None, "skip updates whose gradient norm is over so many times the median of the last 100"
    )
    ema_decay: float | None = setting(None, "keep an exponential moving average of the weights, e.g. 0.9999")
    lora_config: LoraSettings | None = setting(
        None, 'train low-rank adapters of model.from_pretrained, not its weights, e.g. "dict(r=16, lora_alpha=16)"'
    )
    update_warmup_steps: bool = setting(ABSENT, legacy="the learning rate follows from the update's number")

    # ---- precision, memory, devices
    dtype: str = setting("bf16", "what the model computes in: bf16 (with fp32 master weights) or fp32")
    plugin: str = setting("zero2", "how ranks share the work: zero1, zero2, or hybrid (tensor, sequence parallel)")
    plugin_config: PluginSettings = setting(doc="arguments of the plugin")
    grad_checkpoint: bool = setting(True, "recompute blocks in the backward pass, as model.grad_ckpt_settings says")
    grad_ckpt_settings: tuple[int, int] | None = setting(None, "stands for model.grad_ckpt_settings")
    grad_ckpt_buffer_size: int = setting(
        0, "bytes of page-locked host memory, per process, in which recomputed blocks' inputs wait; 0: on the device"
    )
    oom_policy: Literal["stop", "shrink"] = setting(
        "stop", "out of memory: stop; or shrink: also halve that bucket's batches when the run is started again"
    )
    dist_timeout: float = setting(1800.0, "seconds after which a rank that waits gives up, and says where")

    # ---- the run
    seed: int = setting(42, "of initial weights, the order of the data and every random choice about a sample")
    epochs: int = setting(1000, "passes over the table")
    max_steps: int | None = setting(None, "stop after so many updates, counted from the first run on")
    load: str | list[str] | None = setting(
        None, "continue from a checkpoint, the newest of several, or a run's newest", several=True
    )
    auto_resume: bool = setting(
        False, "continue from the newest checkpoint of exp_name's folder, if it has one; else as load says"
    )
    start_epoch: int | None = setting(None, "with --load: the epoch to go on with")
    start_step: int | None = setting(None, "with --load: the micro-batch of that epoch to go on with")

    # ---- evaluation
    eval_every: int = setting(0, "updates between evaluations of the (averaged) weights; 0: none")
    eval_prompts: str | list[str] | None = setting(
        None, "samples are drawn of these: prompts, or a file of them (csv or txt)", several=True
    )
    eval_option: EvalOption = setting(doc="how")
    eval_data_path: str | None = setting(
        None, "table of samples that are not trained on, whose loss is computed; None: of some that are"
    )
    eval_samples: int = setting(16, "of each clip size and length, for that loss; 0: no loss")
    eval_times: list[float] = setting([0.1, 0.3, 0.5, 0.7, 0.9], "at which it is computed: 0 is data, 1 is noise")

    # ---- what it leaves
    outputs: str = setting("outputs", "folder of the run folders")
    exp_name: str | None = setting(None, "name of the run folder; None: time and config")
    log_every: int = setting(10, "updates between lines of the log")
    ckpt_every: int = setting(2000, "updates between checkpoints; 0: only at the end")
    keep_n_latest: int | None = setting(None, "checkpoints that are kept; None: all")
    keep_every: int | None = setting(None, "checkpoints of every so many updates are kept for ever; None: none")
    async_io: bool = setting(False, "write checkpoints in the background: training waits only for a copy in memory")
    verify_checkpoint: bool = setting(True, "compare what --load reads with its checksums; False: sizes alone")
    wandb: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("mmdit", "its project")
    save_master_weights: bool = setting(ABSENT, legacy="checkpoints always hold the fp32 master weights")
    load_master_weights: bool = setting(ABSENT, legacy="--load always restores the fp32 master weights")

    # Settings that stand for another one: giving either is the same.
    aliases: ClassVar[dict[str, str]] = {
        "lr": "optim.lr",
        "eps": "optim.eps",
        "grad_ckpt_setting": "model.grad_ckpt_settings",
        "grad_ckpt_settings": "model.grad_ckpt_settings",
        "model.grad_ckpt_setting": "model.grad_ckpt_settings",
        "grad_ckpt_policy": "model.grad_ckpt_policy",
        "compile": "model.compile",
        "resize": "dataset.resize",
    }


LEAST = {
    "accumulation_steps": 1,
    "ae_spatial_compression": 1,
    "ckpt_every": 0,
    "epochs": 1,
    "eval_every": 0,
    "eval_option.flow_shift": 0,
    "eval_option.guidance": 0,
    "eval_option.height": 1,
    "eval_option.num_frames": 1,
    "eval_option.num_steps": 1,
    "eval_option.seed": 0,
    "eval_option.width": 1,
    "eval_samples": 0,
    "grad_ckpt_buffer_size": 0,
    "grad_clip": 0,
    "keep_every": 1,
    "keep_n_latest": 1,
    "log_every": 1,
    "lora_config.lora_alpha": 1,
    "lora_config.r": 1,
    "max_skipped_in_row": 1,
    "max_steps": 0,
    "num_workers": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "prefetch_factor": 1,
    "seed": 0,
    "start_epoch": 0,
    "start_step": 0,
    "warmup_steps": 0,
}


def validate(cfg: Mapping[str, Any], world_size: int) -> None:
    """The rules among settings; touches no file and no device.

    Args:
        cfg: of `load_config(argv, TrainSettings)`.
        world_size: processes of the job.

    Raises:
        ValueError: the first rule that is broken: the setting, its value, what it must be.
    """
    check_at_least(cfg, LEAST)
    check_at_most(cfg, {"seed": 2**63 - 1})  # what random generators take
    check_dtype(cfg["dtype"])
    check_model(cfg["model"])
    check_latents(cfg["model"], cfg["ae"])
    check_plugin(cfg, world_size)
    check_timeout(cfg["dist_timeout"])
    check_shardformer(cfg)
    _check_optimization(cfg)
    _check_lora(cfg)
    _check_offload(cfg)
    _check_buckets(cfg)
    _check_conditions(cfg)
    _check_table(get(cfg, "dataset.data_path"))
    _check_survival(cfg)
    _check_read_timeout(cfg, world_size)
    _check_evaluation(cfg)


def _check_survival(cfg: Mapping[str, Any]) -> None:
    if cfg["auto_resume"] and not cfg["exp_name"]:
        raise ValueError(
            "auto_resume=True continues the run of a name, and without exp_name each start makes a new folder: set "
            "--exp-name NAME"
        )
    if cfg["oom_policy"] == "shrink" and not cfg["auto_resume"]:
        raise ValueError(
            "oom_policy='shrink' halves a bucket when the run is started again: set --auto-resume True (and let "
            "torchrun --max-restarts N start it)"
        )
    if cfg["skip_spikes"] is not None and not cfg["skip_spikes"] > 1:
        raise ValueError(
            f"skip_spikes={cfg['skip_spikes']} must be above 1 (times the median), e.g. 10; None skips none"
        )


def _check_read_timeout(cfg: Mapping[str, Any], world_size: int) -> None:
    """Files that do not answer may cost a batch twice the time of one, and other ranks wait for that batch."""
    parameter = DATASETS.parameters(cfg["dataset"]["type"]).get("read_timeout")
    if parameter is None or world_size == 1 or cfg["num_workers"] == 0 or cfg["cached_video"]:
        return
    longest = cfg["dataset"].get("read_timeout", parameter.default)
    if not 2 * longest < cfg["dist_timeout"]:
        raise ValueError(
            f"dataset.read_timeout={longest:g}: files that do not answer may hold a batch up for twice that, and other "
            f"ranks wait for it for dist_timeout={cfg['dist_timeout']:g} s: set e.g. --dataset.read-timeout "
            f"{cfg['dist_timeout'] / 4:g}"
        )


def _check_optimization(cfg: Mapping[str, Any]) -> None:
    if not cfg["optim"]["lr"] > 0:
        raise ValueError(f"optim.lr={cfg['optim']['lr']} must be above 0")
    for beta in cfg["optim"].get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"optim.betas={tuple(cfg['optim']['betas'])} must be in [0, 1)")
    if cfg["optim"].get("no_decay_norms_and_biases") and not takes_weight_decay(cfg["optim"]["cls"]):
        raise ValueError(f"optim.no_decay_norms_and_biases=True: optim.cls='{cfg['optim']['cls']}' decays no weights")
    if cfg["ema_decay"] is not None and not 0 < cfg["ema_decay"] < 1:
        raise ValueError(f"ema_decay={cfg['ema_decay']} must be between 0 and 1, e.g. 0.9999; None keeps no average")
    for encoder, probability in cfg["dropout_ratio"].items():
        if not 0 <= probability <= 1:
            raise ValueError(f"dropout_ratio.{encoder}={probability} must be a probability, 0 to 1")


def _check_lora(cfg: Mapping[str, Any]) -> None:
    lora = cfg["lora_config"]
    if lora is None:
        return
    if not cfg["model"].get("from_pretrained"):
        raise ValueError(
            "lora_config needs weights to adapt: set --model.from-pretrained FILE (also to go on with --load)"
        )
    if lora["target_modules"] == []:
        raise ValueError("lora_config.target_modules=[] adapts nothing: name layers, or leave it out for the default")
    if lora["init_lora_weights"] is False:
        raise ValueError("lora_config.init_lora_weights=False would change the model before it is trained: set True")
    if not 0 <= lora["lora_dropout"] < 1:
        raise ValueError(f"lora_config.lora_dropout={lora['lora_dropout']} must be at least 0 and below 1")
    check_targets(targets_of(lora, cfg["model"].get("fused_qkv", True)), cfg["model"])


def _check_offload(cfg: Mapping[str, Any]) -> None:
    """What is offloaded is what recomputed blocks keep, so there have to be some."""
    size, model = cfg["grad_ckpt_buffer_size"], cfg["model"]
    if not size:
        return
    if not cfg["grad_checkpoint"]:
        why, remedy = "grad_checkpoint=False", "set --grad-checkpoint True"
    elif model["grad_ckpt_policy"] != "full" and not _recomputed_blocks(model):
        why, remedy = f"model.grad_ckpt_settings={model['grad_ckpt_settings']}", "raise --grad-ckpt-settings"
    else:
        return
    raise ValueError(
        f"grad_ckpt_buffer_size={size} is for the inputs of recomputed blocks, and {why} recomputes none: "
        f"{remedy}, or --grad-ckpt-buffer-size 0"
    )


def _recomputed_blocks(model: Mapping[str, Any]) -> int:
    depths, counts = (model["depth"], model["depth_single_blocks"]), model["grad_ckpt_settings"]
    return sum(depths) if counts is None else sum(map(min, depths, counts))


def _check_buckets(cfg: Mapping[str, Any]) -> None:
    if not any(cfg["bucket_config"].values()):
        raise ValueError("bucket_config is empty: give it {resolution: {frames: (probability, samples per batch)}}")
    for resolution, by_frames in cfg["bucket_config"].items():
        resolution_sizes(resolution, cfg["ae_spatial_compression"])
        for num_frames, (probability, batch_size) in by_frames.items():
            where = f"bucket_config.{resolution}.{num_frames}"
            check_frames(num_frames, cfg["ae"], where)
            odds = probability if isinstance(probability, (tuple, list)) else (probability,)
            if not all(0 <= p <= 1 for p in odds):
                raise ValueError(f"{where}: probability {probability} must be 0 to 1")
            if batch_size < 1:
                raise ValueError(f"{where}: batch size {batch_size} must be at least 1")


def _check_conditions(cfg: Mapping[str, Any]) -> None:
    takes_condition = cfg["model"].get("cond_embed", False)
    if cfg["condition_config"] is None:
        if takes_condition:
            raise ValueError(
                "model.cond_embed=True needs conditions to train on: set --condition_config "
                '"dict(t2v=1, i2v_head=5)", or --model.cond-embed False'
            )
        return
    if not takes_condition:
        raise ValueError("condition_config needs a model that takes conditions: set --model.cond-embed True")
    check_condition_config(cfg["condition_config"])


def _check_evaluation(cfg: Mapping[str, Any]) -> None:
    if not cfg["eval_every"]:
        for name in ("eval_prompts", "eval_data_path"):
            if cfg[name]:
                raise ValueError(f"{name}={cfg[name]!r} has no use with eval_every=0: set --eval-every 500")
        return
    if not cfg["eval_prompts"] and not cfg["eval_samples"]:
        raise ValueError("eval_every: there is nothing to evaluate: set --eval-prompts FILE, or --eval-samples 16")
    if cfg["eval_prompts"]:
        try:
            SamplerOptions.from_config(cfg["eval_option"])
            check_frames(eval_size(cfg).num_frames, cfg["ae"], "eval_option.num_frames")
        except ValueError as error:  # which calls the setting what it is called when sampling
            raise ValueError(str(error).replace("sampling_option", "eval_option")) from None
    if cfg["eval_samples"] and not cfg["eval_times"]:
        raise ValueError("eval_times=[] gives the loss no time: set e.g. --eval-times [0.3,0.7], or --eval-samples 0")
    for time in cfg["eval_times"]:
        if not 0 < time <= 1:
            raise ValueError(f"eval_times={list(cfg['eval_times'])}: {time} must be above 0, which is data, up to 1")
    if cfg["eval_data_path"]:
        _check_table(cfg["eval_data_path"], "eval_data_path")


def _check_table(path: str | None, where: str = "dataset.data_path") -> None:
    if path is None:
        raise ValueError("dataset.data_path is not set: give the table of videos, --dataset.data-path TABLE.csv")
    if Path(path).suffix.lower() not in TABLE_SUFFIXES and not Path(path).is_dir():
        raise ValueError(
            f"{where}='{path}' is no table: a {' or '.join(TABLE_SUFFIXES)} file, or a folder of its shards"
        )


def require_available(cfg: Mapping[str, Any]) -> None:
    """ValueError that says which of the settings need what a later version brings, and what to do today."""
    reasons = []
    if cfg["dtype"] not in ("bf16", "fp32", "float32"):
        reasons.append(
            f"dtype='{cfg['dtype']}' is not available for training in this version: set --dtype bf16 or fp32"
        )
    reasons += missing_requirements(cfg["model"], to_torch_dtype(cfg["dtype"]))
    raise_unavailable(reasons)


def check_paths(cfg: Mapping[str, Any]) -> None:
    """The files and folders that the config names exist (FileNotFoundError) and fit the model (ValueError)."""
    path = Path(cfg["dataset"]["data_path"])
    if find_shards(path, bool(get(cfg, "dataset.memory_efficient"))) is None and not path.is_file():
        raise FileNotFoundError(
            f"dataset.data_path='{path}' does not exist: make it with scripts/cnv/meta.py (see datasets/README.md)"
        )
    if cfg["eval_data_path"] and not Path(cfg["eval_data_path"]).exists():
        raise FileNotFoundError(
            f"eval_data_path='{cfg['eval_data_path']}' does not exist: make it with scripts/cnv/meta.py"
        )
    read_prompts(cfg["eval_prompts"])
    check_weights(cfg, ("model", "ae", "t5", "clip"))
    check_text_widths(cfg, text_width)
