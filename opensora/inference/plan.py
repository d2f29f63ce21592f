"""What a call is to draw, checked before any model is loaded: prompts, sizes, files, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.checkpoint_folder import resolve_checkpoint
from opensora.common import get_logger
from opensora.diffusion.random import derive_seed
from opensora.inference.comparison import first_difference
from opensora.inference.image_first import image_path
from opensora.inference.metadata import read_comment, sample_tags
from opensora.inference.output import check_writable, output_folder, sample_suffix
from opensora.inference.pipeline import Request
from opensora.inference.prompts import Prompt, add_fps, add_motion_score, prompts_from_texts
from opensora.inference.references import check_references, condition_type
from opensora.inference.refine import refine
from opensora.inference.size import Compression, SampleSize, first_frame_size, sample_size
from opensora.inference.text_limits import report_long_texts
from opensora.models.sources import find_weights, open_model
from opensora.registry import AUTOENCODERS, DATASETS


@dataclass(frozen=True)
class Job:
    """The `sample`-th sample of a prompt, and the file it goes to."""

    prompt: Prompt
    sample: int
    path: Path

    def is_done(self) -> bool:
        """Whether its sample is there. An empty file is what is left after a power cut on some file systems."""
        return self.path.is_file() and self.path.stat().st_size > 0


@dataclass(frozen=True)
class Plan:
    """All that is to do, checked: nothing in it depends on the rank.

    Attributes:
        jobs: the samples that are not there yet. wanted: all that were asked for.
        weights: the file or checkpoint that `model.from_pretrained` means, if it is set.
        lora: the adapters to merge into them, if there are.
        first_frame: the size that the image model draws first frames in, with use_t2i2v.
        part: in the names of files about all samples of the call, which rows of the list they are: others may draw the
            others. Empty for a whole list.
    """

    size: SampleSize
    jobs: list[Job]
    wanted: list[Job]
    weights: Path | None
    lora: Path | None
    first_frame: SampleSize | None = None
    part: str = ""

    @property
    def folder(self) -> Path:
        return self.wanted[0].path.parent

    @property
    def model_files(self) -> dict[str, str | None]:
        """What draws the samples, for their tags: a setting may name a run, whose newest checkpoint changes."""
        return {name: path and str(path) for name, path in (("weights", self.weights), ("lora", self.lora))}


def make_plan(cfg) -> Plan:
    """The samples that `cfg` asks for and that are not there yet. Looks for the weights, but does not read them.

    Raises:
        ValueError, FileNotFoundError: no prompt, an unknown size, references or weights that are absent or do not fit,
            or a language model that does not answer.
    """
    plan = plan_samples(cfg, *locate_weights(cfg))
    asked = [(to_request(job, cfg, plan.size).text, job.prompt.negative) for job in plan.jobs]
    if asked:
        report_long_texts(cfg, [text for texts in asked for text in texts])
    return plan


def plan_samples(cfg, weights: Path | None, lora: Path | None) -> Plan:
    """`make_plan` of a model that may be loaded already: of its files nothing is asked for but what is given here."""
    size = sample_size(cfg)
    prompts = read_prompts(cfg)
    _check_references(cfg, prompts, size)
    folder, part = output_folder(cfg.save_dir, size.num_frames, size.name), _part_of_list(cfg, prompts)
    wanted = [
        Job(prompt, k, folder / (prompt.file_stem(k, cfg.num_sample) + sample_suffix(size.num_frames)))
        for prompt in prompts
        for k in range(cfg.num_sample)
    ]
    plan = Plan(size, wanted, wanted, weights, lora, first_frame_size(cfg, size) if cfg.use_t2i2v else None, part)
    jobs = [job for job in wanted if not job.is_done()]
    if len(jobs) < len(wanted):
        _report_skipped(cfg, plan, [job for job in wanted if job.is_done()])
    if jobs:
        check_writable(plan.folder, "save_dir")
        jobs = _refined(cfg, jobs, plan)
    return replace(plan, jobs=jobs)


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


def _check_references(cfg, prompts: Sequence[Prompt], size: SampleSize) -> None:
    cond_type = condition_type(cfg)
    if cond_type == "t2v" and cfg.ref:
        raise ValueError(f"ref='{cfg.ref}' has no use with cond_type='t2v': add --cond_type i2v_head, or leave it out")
    unused = sum(bool(prompt.references) for prompt in prompts) if cond_type == "t2v" else 0
    if unused:
        get_logger().warning(
            f"{unused} of {len(prompts)} prompts have a reference, which cond_type='t2v' does not use: add --cond_type "
            "i2v_head to start from it"
        )
    causal = Compression.of(AUTOENCODERS.get(cfg.ae.type)).causal
    check_references(prompts, cond_type, cfg.model.get("cond_embed", False), causal, size, drawn=cfg.use_t2i2v)


def _part_of_list(cfg, prompts: Sequence[Prompt]) -> str:
    whole = not cfg.start_index and cfg.end_index is None
    return "" if whole else f"_{prompts[0].index:04d}-{prompts[-1].index:04d}"


def _report_skipped(cfg, plan: Plan, done: Sequence[Job]) -> None:
    """Say what is there already, and if some of it is not what would be drawn now: nobody would expect it."""
    get_logger().info(f"{len(done)} of {len(plan.wanted)} samples are in {plan.folder} already: skipped")
    found = [(job, difference) for job in done if (difference := _difference(job, cfg, plan))]
    if found:
        job, difference = found[0]
        get_logger().warning(
            f"{len(found)} of them are not what you ask for ({job.path.name}: {difference}): give another --save-dir, "
            "or delete them to have them drawn anew"
        )


def _difference(job: Job, cfg, plan: Plan) -> str | None:
    """In what the sample that is there is another one than the job's, as far as the file tells."""
    found = read_comment(job.path)
    if found is None:
        try:
            text = job.path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return None if text == job.prompt.text.strip() else "another prompt"
    if plan.first_frame and not job.prompt.references:
        job = starting_from(job, image_path(job.path))
    asked = json.loads(tags_of(job, to_request(job, cfg, plan.size), cfg, plan.model_files)["comment"])
    return first_difference(found, asked, plan.size.is_image)


def _refined(cfg, jobs: Sequence[Job], plan: Plan) -> list[Job]:
    prompts = list({job.prompt.index: job.prompt for job in jobs}.values())
    refined = {prompt.index: prompt for prompt in refine(cfg, prompts, plan.size.is_image, plan.folder, plan.part)}
    return [replace(job, prompt=refined[job.prompt.index]) for job in jobs]


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


# ------------------------------------------------------------------------------------------- in the pipeline's terms


def to_request(job: Job, cfg, size: SampleSize) -> Request:
    """A job in the pipeline's terms."""
    prompt = job.prompt
    condition = condition_type(cfg) if prompt.references and not size.is_image else "t2v"
    return Request(
        text=model_text(prompt.description, size, cfg.fps_save, prompt.motion or cfg.motion_score),
        seed=derive_seed(base_seed(cfg), prompt.index, job.sample),
        negative=prompt.negative,
        condition=condition,
        references=() if condition == "t2v" else prompt.references,
    )


def starting_from(job: Job, picture: Path) -> Job:
    """The job with a picture to start from."""
    return replace(job, prompt=replace(job.prompt, references=(str(picture),)))


def to_image_request(job: Job, cfg) -> Request:
    """The first frame of a job, as the image model is asked for it: with a seed of its own."""
    prompt = job.prompt
    return Request(prompt.description, derive_seed(base_seed(cfg), prompt.index, job.sample, "image"), prompt.negative)


def base_seed(cfg) -> int:
    seed = cfg.sampling_option.get("seed")
    return cfg.seed if seed is None else seed


def model_text(text: str, size: SampleSize, fps: float | None, motion_score: str | float | None) -> str:
    """The prompt as the model reads it: videos are told their frame rate and motion score, as captions in training."""
    if size.is_image:
        return text
    if fps is not None:
        text = add_fps(text, fps)
    return text if motion_score is None else add_motion_score(text, motion_score)


def tags_of(job: Job, request: Request, cfg, model_files: Mapping[str, str | None]) -> dict[str, str]:
    """What the sample's file is to say of it (`metadata.py`)."""
    facts = {
        "seed": base_seed(cfg),
        "prompt_index": job.prompt.index,
        "sample": job.sample,
        "text": request.text,
        "negative": request.negative,
        "condition": request.condition,
        "references": request.references,
        **model_files,
    }
    return sample_tags(job.prompt.text, facts, cfg)
