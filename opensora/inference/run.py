"""A prompt list, sampled: what is to do, which rank does what, in which batches, into which files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from opensora.checkpoint_folder import resolve_checkpoint
from opensora.common import get_logger
from opensora.diffusion.random import derive_seed
from opensora.inference.output import output_folder, sample_suffix, save_sample
from opensora.inference.pipeline import Pipeline, Request
from opensora.inference.prompts import Prompt, add_fps, add_motion_score, prompts_from_texts
from opensora.inference.references import check_references
from opensora.inference.size import Compression, SampleSize
from opensora.models.sources import download, find_weights, open_model
from opensora.models.text import cut_summary
from opensora.registry import AUTOENCODERS, DATASETS


@dataclass(frozen=True)
class Job:
    """The `sample`-th sample of a prompt, and the file it goes to."""

    prompt: Prompt
    sample: int
    path: Path


@dataclass(frozen=True)
class Plan:
    """All that is to do, checked: nothing in it depends on the rank.

    Attributes:
        weights: the file or checkpoint that `model.from_pretrained` means, if it is set.
        lora: the adapters to merge into them, if there are.
    """

    size: SampleSize
    jobs: list[Job]
    weights: Path | None
    lora: Path | None


def make_plan(cfg) -> Plan:
    """The samples that `cfg` asks for and that are not there yet. Looks for the weights, but does not read them.

    Raises:
        ValueError, FileNotFoundError: no prompt, an unknown size, references or weights that are absent or do not fit.
    """
    compression = Compression.of(AUTOENCODERS.get(cfg.ae.type))
    size = SampleSize.from_config(cfg.sampling_option, compression, cfg.model.get("patch_size", 2))
    prompts = read_prompts(cfg)
    if cfg.cond_type == "t2v" and cfg.ref:
        raise ValueError(f"ref='{cfg.ref}' has no use with cond_type='t2v': add --cond_type i2v_head, or leave it out")
    check_references(prompts, cfg.cond_type, cfg.model.get("cond_embed", False), compression.causal, size)
    folder = output_folder(cfg.save_dir, size.num_frames, size.name)
    jobs = [
        Job(prompt, k, folder / (prompt.file_stem(k, cfg.num_sample) + sample_suffix(size.num_frames)))
        for prompt in prompts
        for k in range(cfg.num_sample)
    ]
    missing = [job for job in jobs if not job.path.exists()]
    if len(missing) < len(jobs):
        get_logger().info(f"{len(jobs) - len(missing)} of {len(jobs)} samples are in {folder} already: skipped")
    return Plan(size, missing, *locate_weights(cfg))


def locate_weights(cfg) -> tuple[Path | None, Path | None]:
    """What `model.from_pretrained` and `lora` mean, on this machine.

    Raises:
        FileNotFoundError: they are nowhere. ValueError, FileNotFoundError: they don't go together, or use_ema=True, but
            there are no averaged weights.
    """
    if not cfg.model.get("from_pretrained"):
        for name in ("use_ema", "lora"):
            if cfg[name]:
                raise ValueError(f"{name}={cfg[name]} needs weights: set --model.from-pretrained outputs/EXP or a file")
        get_logger().warning("model.from_pretrained is not set: sampling from a model with random weights")
        return None, None
    weights, lora = find_weights(cfg.model.from_pretrained), cfg.lora and resolve_checkpoint(cfg.lora)
    if cfg.use_ema or lora:
        open_model(weights, cfg.use_ema, lora)
    return weights, lora


def read_prompts(cfg) -> list[Prompt]:
    """The prompts of `prompt`, else of `dataset.data_path`, cut to rows [start_index, end_index)."""
    negative = cfg.neg
    if cfg.prompt is not None:
        prompts = prompts_from_texts(cfg.prompt, cfg.ref, negative)
    else:
        prompts = DATASETS.build(cfg.dataset, where="dataset").prompts(cfg.ref, negative)
    chosen = prompts[cfg.start_index : cfg.end_index]
    if not chosen:
        raise ValueError(
            f"there is no prompt to sample: start_index={cfg.start_index}, end_index={cfg.end_index} of a list of "
            f"{len(prompts)}: check the list and the indices"
        )
    return chosen


def sample_all(cfg, context) -> None:
    """Sample what `cfg` asks for; the ranks of `context` share the samples. Every rank calls it.

    Ranks do not wait for each other at the end: the last of a list may take longer than a time-out.
    """
    download(cfg.model.get("from_pretrained"))  # on every rank, since others would wait for rank 0 only so long
    plan = context.on_main(lambda: make_plan(cfg))
    if not plan.jobs:
        get_logger().info("nothing to sample")
        return
    get_logger().info(f"{len(plan.jobs)} samples go to {plan.jobs[0].path.parent}")
    pipeline = Pipeline.from_config(cfg, plan.size, plan.weights, plan.lora, context.device)
    mine = plan.jobs[context.rank :: context.world_size]
    done = 0
    with step_progress(mine, cfg, shown=context.rank == 0) as on_step:
        for batch in batches(mine, cfg.batch_size):
            videos = pipeline([to_request(job, cfg, plan.size) for job in batch], on_step)
            for job, video in zip(batch, videos, strict=True):
                save_sample(job.path, video, cfg.fps_save, cfg.crf, job.prompt.text)
            done += len(batch)
            if not sys.stderr.isatty():
                get_logger().info(f"{done} of {len(mine)} samples done")
    _report_cut_texts(pipeline)


def _report_cut_texts(pipeline: Pipeline) -> None:
    for name, encoder in (("t5", pipeline.t5), ("clip", pipeline.clip)):
        if encoder.texts_cut:
            counts = encoder.texts_seen, encoder.texts_cut, encoder.tokens_cut
            get_logger().warning(cut_summary(name, encoder.max_length, *counts))


def to_request(job: Job, cfg, size: SampleSize) -> Request:
    """A job in the pipeline's terms."""
    prompt, option = job.prompt, cfg.sampling_option
    seed = cfg.seed if option.get("seed") is None else option.seed
    return Request(
        text=model_text(prompt.text, size, cfg.fps_save, cfg.motion_score),
        seed=derive_seed(seed, prompt.index, job.sample),
        negative=prompt.negative,
        condition=cfg.cond_type if prompt.references and not size.is_image else "t2v",
        references=prompt.references,
    )


def model_text(text: str, size: SampleSize, fps: float | None, motion_score: str | float | None) -> str:
    """The prompt as the model reads it: videos are told their frame rate and motion score, as captions in training."""
    if size.is_image:
        return text
    if fps is not None:
        text = add_fps(text, fps)
    return text if motion_score is None else add_motion_score(text, motion_score)


def batches(jobs: Sequence[Job], batch_size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), batch_size):
        yield jobs[start : start + batch_size]


@contextmanager
def step_progress(jobs: Sequence[Job], cfg, shown: bool) -> Iterator:
    """A bar on a terminal, over the steps of all batches of this rank; yields what to call after each step."""
    total = -(-len(jobs) // cfg.batch_size) * cfg.sampling_option.num_steps
    disable = None if shown else True  # None: where there is no terminal
    with tqdm(total=total, unit="step", desc=f"{len(jobs)} samples", disable=disable) as bar:
        yield bar.update
