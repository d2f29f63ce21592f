"""From a resolved config to the parts of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from opensora.common import get_logger, to_torch_dtype
from opensora.data.bucket import BucketTable
from opensora.data.cache import text_key
from opensora.data.loader import build_loader
from opensora.data.sampler import BucketSampler
from opensora.models.activation import checkpoint_blocks
from opensora.models.autoencoder.posterior import Posterior
from opensora.models.compilation import compile_blocks
from opensora.models.frozen import build_frozen
from opensora.models.lora import LoraStart, base_of
from opensora.models.offload import offload_inputs
from opensora.models.sources import find_weights, open_model
from opensora.models.weights import build_model
from opensora.parallel.context import ParallelContext
from opensora.parallel.engine import Engine
from opensora.parallel.offload import HostBuffer
from opensora.parallel.sequence import split_sequence
from opensora.parallel.shardformer import apply_shardformer
from opensora.parallel.sharing import share_autoencoder
from opensora.registry import AUTOENCODERS, DATASETS, TEXT_ENCODERS
from opensora.settings import check_text_width, parallel_sizes
from opensora.training.cache_facts import Caches, check_caches
from opensora.training.encoders import CachedText, CachedVideo, TextEncoders, VideoEncoder
from opensora.training.optim import build_optimizer
from opensora.training.step import FlowMatchingStep


def build_data(cfg, context: ParallelContext, caches: Caches) -> tuple[BucketSampler, DataLoader]:
    """The sampler of this rank and the loader that follows it, from wherever the sampler is when iterating begins."""
    dataset = DATASETS.build(cfg.dataset, where="dataset")
    dataset.use_caches(*caches)
    buckets = BucketTable(cfg.bucket_config, dataset.fps_max, cfg.ae_spatial_compression)
    context.on_main(lambda: check_caches(cfg, caches, dataset, buckets))
    sampler = BucketSampler(
        dataset.table,
        buckets,
        seed=cfg.seed,
        epochs=cfg.epochs,
        data_parallel_size=context.data_parallel_size,
        data_parallel_rank=context.data_parallel_rank,
        accumulation_steps=cfg.accumulation_steps,
    )
    return sampler, build_loader(dataset, sampler, cfg.num_workers, cfg.prefetch_factor)


def build_step(cfg, context: ParallelContext, caches: Caches) -> FlowMatchingStep:
    """The step of a run; encoders whose work is in a cache are not built. Ranks that see the same samples share the
    autoencoder's work."""
    dtype, device = to_torch_dtype(cfg.dtype), context.device
    video: VideoEncoder | CachedVideo
    if caches.video is None:
        video = build_video_encoder(cfg, device)
        if context.model.process_group is not None:
            share_autoencoder(video.autoencoder, context.model.process_group)
    else:
        posterior, is_causal = (caches.video.description[key] for key in ("posterior", "is_causal"))
        video = CachedVideo(posterior and Posterior(*posterior), is_causal, device, dtype)
    text: TextEncoders | CachedText
    if caches.text is None:
        text = build_text_encoders(cfg, device)
    else:
        text = CachedText(caches.text.get(text_key("")), cfg.dropout_ratio, device)
    return FlowMatchingStep(
        video,
        text,
        device=device,
        dtype=dtype,
        patch_size=cfg.model.get("patch_size", 2),
        condition_config=cfg.condition_config,
        guidance_embed=cfg.model.guidance_embed,
    )


def build_video_encoder(cfg, device: torch.device) -> VideoEncoder:
    dtype = to_torch_dtype(cfg.dtype)
    autoencoder = build_frozen(AUTOENCODERS, cfg.ae, "ae", dtype, device)
    autoencoder.drop_decoder()
    return VideoEncoder(autoencoder, device, dtype)


def build_text_encoders(cfg, device: torch.device) -> TextEncoders:
    dtype = to_torch_dtype(cfg.dtype)
    t5 = apply_shardformer(build_frozen(TEXT_ENCODERS, cfg.t5, "t5", dtype, device))
    clip = build_frozen(TEXT_ENCODERS, cfg.clip, "clip", dtype, device)
    for section, encoder in (("t5", t5), ("clip", clip)):
        check_text_width(cfg, section, encoder.width)  # of a hub name only known now
    return TextEncoders(t5, clip, cfg.dropout_ratio, dtype)


def build_engine(cfg, context: ParallelContext, checkpoint: Path | None) -> Engine:
    """The trained model, from `checkpoint`, `model.from_pretrained` or from scratch, under its optimizer and plugin."""
    dtype = to_torch_dtype(cfg.dtype)
    settings = {**cfg.model, "from_pretrained": _weights(cfg, checkpoint)}
    lora = _lora(cfg, settings["from_pretrained"], checkpoint)
    _check_condition_is_trained(cfg, lora)
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = build_model(settings, dtype, context.device)
    split_sequence(model, context.sequence, parallel_sizes(cfg).mode)
    recomputed = []
    if cfg.grad_checkpoint:
        recomputed = checkpoint_blocks(model, cfg.model.grad_ckpt_settings, cfg.model.grad_ckpt_policy)
    if cfg.model.compile:
        compile_blocks(model)
    if recomputed and cfg.grad_ckpt_buffer_size:
        offload_inputs(recomputed, HostBuffer(cfg.grad_ckpt_buffer_size, context.device))
    return Engine(
        context,
        model.train(),
        lambda trained: build_optimizer(trained.parameters(), cfg.optim),
        cfg.plugin,
        cfg.plugin_config,
        dtype,
        cfg.grad_clip,
        lora=lora,
    )


def _weights(cfg, checkpoint: Path | None) -> str | None:
    """What the model's weights are loaded from; beside a checkpoint's adapters, what these were trained on."""
    if checkpoint is not None and cfg.lora_config is None:
        return str(checkpoint)
    if cfg.lora_config is None:
        return cfg.model.from_pretrained
    given = find_weights(cfg.model.from_pretrained).absolute()  # not resolved: a hub cache's links have the names
    if checkpoint is None:
        return str(given)
    trained_on = base_of(checkpoint)
    if trained_on is None:
        get_logger().warning(
            f"what the adapters of {checkpoint} were trained on is not where it was: going on with {given}"
        )
    elif trained_on != given:
        get_logger().warning(f"the adapters of {checkpoint} were trained on {trained_on}: taken instead of {given}")
    return str(trained_on or given)


def _lora(cfg, base: str, checkpoint: Path | None) -> LoraStart | None:
    if cfg.lora_config is None:
        return None
    return LoraStart.of(cfg.lora_config, cfg.model.get("fused_qkv", True), base, checkpoint)


def _check_condition_is_trained(cfg, lora: LoraStart | None) -> None:
    """An image-to-video model from text-to-video weights has a `cond_in` of zeros, which adapters leave as it is."""
    if lora is None or not cfg.model.get("cond_embed") or "cond_in" in lora.config.target_modules:
        return
    if "cond_in.weight" not in open_model(Path(lora.base)).shapes:
        raise ValueError(
            f"model.cond_embed=True, but {lora.base} has no cond_in, and adapters would leave it zero: no condition "
            "would be seen. Start from image-to-video weights, or add 'cond_in' to lora_config.target_modules"
        )
