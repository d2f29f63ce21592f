"""A prompt list, sampled: which rank does what, phase by phase, into which files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from opensora.common import get_logger, to_torch_dtype
from opensora.inference.contact_sheet import Entry, write_contact_sheet
from opensora.inference.division import Division
from opensora.inference.image_first import image_path, image_pipeline
from opensora.inference.metadata import has_tags
from opensora.inference.output import save_sample, write_png
from opensora.inference.phases import PhaseMeter, save_report
from opensora.inference.pipeline import Pipeline, Request, TextEncoder
from opensora.inference.plan import Job, Plan, make_plan, starting_from, tags_of, to_image_request, to_request
from opensora.inference.prompts import CONTACT_SHEET
from opensora.inference.text_phase import embed_texts, release_memory
from opensora.models.sources import download
from opensora.settings import get, parallel_sizes


def sample_all(cfg, context, on_main: Callable[[Callable[[], Plan]], Plan] | None = None) -> None:
    """Sample what `cfg` asks for, on all ranks of `context`: those that `plugin` lets share a model draw a sample
    together, the others other samples. Every rank calls it.

    Ranks do not wait for each other at the end: the last of a list may take longer than a time-out.

    on_main: as the context's; one without a time-out lets others wait while a language model refines a long list.
    """
    sections = ("model", "img_flux") if cfg.use_t2i2v else ("model",)
    for section in sections:  # on every rank, since others would wait for rank 0 only so long
        download(get(cfg, f"{section}.from_pretrained"))
    sizes = parallel_sizes(cfg)
    context = context.share_samples(sizes.tensor, sizes.sequence)
    plan = (on_main or context.on_main)(lambda: make_plan(cfg))
    if not plan.jobs:
        get_logger().info("nothing to sample")
        if context.rank == 0 and not _contact_sheet(plan).exists():
            _write_sheet(plan)
        return
    get_logger().info(f"{len(plan.jobs)} samples go to {plan.folder}")
    mine = plan.jobs[context.data_parallel_rank :: context.data_parallel_size]
    meter = PhaseMeter(context.device)
    if mine:
        _sample(cfg, plan, mine, context, meter)
    meter.log()
    rank = f"_rank{context.rank}" if context.rank else ""
    save_report(
        plan.folder / f"phases{rank}{plan.part}.json",
        {"samples": len(mine), "offload": cfg.offload, "phases": meter.report()},
    )


def _sample(cfg, plan: Plan, jobs: Sequence[Job], context, meter: PhaseMeter) -> None:
    """Text encoders, image model, video model: each is gone before the next is loaded."""
    with meter("text"):
        asked = [text for job in jobs for text in _texts(job, cfg, plan)]
        texts = embed_texts(cfg, asked, to_torch_dtype(cfg.dtype), context.device)
    if plan.first_frame:
        jobs = _with_first_frames(cfg, plan, jobs, texts, context, meter)
    with meter("load"):
        pipeline = Pipeline.from_config(
            cfg, plan.size, plan.weights, plan.lora, context.device, texts, meter, Division.of(cfg, context)
        )

    def save(job: Job, request: Request, video: Tensor) -> None:
        if _writes(context):
            tags = tags_of(job, request, cfg, plan.model_files)
            save_sample(job.path, video, cfg.fps_save, cfg.crf, job.prompt.text, tags)

    _draw(pipeline, [(job, to_request(job, cfg, plan.size)) for job in jobs], save, cfg, context, meter)
    if _writes(context):
        _write_sheet(plan)


def _texts(job: Job, cfg, plan: Plan) -> Iterator[str]:
    """All that will be asked of the text encoders."""
    requests = [to_request(job, cfg, plan.size)]
    if plan.first_frame and not job.prompt.references:
        requests.append(to_image_request(job, cfg))
    for request in requests:
        yield from (request.text, request.negative)


def _with_first_frames(
    cfg, plan: Plan, jobs: Sequence[Job], texts: tuple[TextEncoder, TextEncoder], context, meter: PhaseMeter
) -> list[Job]:
    """The jobs with an image to start from; those that have no reference of their own get one drawn.

    Images are kept, and taken again by a call that would draw the same. Every rank writes those it draws: the ranks
    that share a model draw the same, and each reads its own.
    """
    drawn = [replace(job, path=image_path(job.path)) for job in jobs if not job.prompt.references]
    asked = [(job, to_image_request(job, cfg)) for job in drawn]
    absent = [not has_tags(job.path, tags_of(job, request, cfg, {})) for job, request in asked]
    missing = [work for work, somewhere in zip(asked, context.model.any(absent), strict=True) if somewhere]
    if missing:
        get_logger().info(f"{len(missing)} first frames go to {missing[0][0].path.parent}")
        _draw_first_frames(cfg, plan, missing, texts, context, meter)
        release_memory()
    return [starting_from(job, image_path(job.path)) if not job.prompt.references else job for job in jobs]


def _draw_first_frames(
    cfg,
    plan: Plan,
    missing: Sequence[tuple[Job, Request]],
    texts: tuple[TextEncoder, TextEncoder],
    context,
    meter: PhaseMeter,
) -> None:
    with meter("load image"):
        pipeline = image_pipeline(cfg, plan.first_frame, texts, context.device, meter, Division.of(cfg, context))

    def save(job: Job, request: Request, frames: Tensor) -> None:
        write_png(job.path, frames[0], tags_of(job, request, cfg, {}))

    _draw(pipeline, missing, save, cfg, context, meter)


def _draw(
    pipeline: Pipeline,
    work: Sequence[tuple[Job, Request]],
    save: Callable[[Job, Request, Tensor], None],
    cfg,
    context,
    meter: PhaseMeter,
) -> None:
    """Sample in batches; save(job, request, frames uint8 [T, H, W, 3]) as soon as a batch is done."""
    done = 0
    with step_progress(len(work), cfg, shown=context.rank == 0) as on_step:
        for batch in batches(work, cfg.batch_size):
            videos = pipeline([request for _, request in batch], on_step)
            with meter("write"):
                for (job, request), video in zip(batch, videos, strict=True):
                    save(job, request, video)
            done += len(batch)
            if not sys.stderr.isatty():
                get_logger().info(f"{done} of {len(work)} samples done")


def _writes(context) -> bool:
    """Whether this rank is the first of those that share a model: they draw the same."""
    return context.model.rank == 0


def _contact_sheet(plan: Plan) -> Path:
    return plan.folder / f"{CONTACT_SHEET}{plan.part}.png"


def _write_sheet(plan: Plan) -> None:
    """A contact sheet of all that was asked for, by the rank that finds all of it there."""
    if len(plan.wanted) > 1 and all(job.is_done() for job in plan.wanted):
        get_logger().info(f"contact sheet of {len(plan.wanted)} samples: {_contact_sheet(plan)}")
        write_contact_sheet(_contact_sheet(plan), [Entry(job.path, job.prompt.text) for job in plan.wanted])


def batches(work: Sequence, batch_size: int) -> Iterator[Sequence]:
    for start in range(0, len(work), batch_size):
        yield work[start : start + batch_size]


@contextmanager
def step_progress(samples: int, cfg, shown: bool) -> Iterator[Callable]:
    """A bar on a terminal, over the steps of all batches of this rank; yields what to call after each step."""
    total = -(-samples // cfg.batch_size) * cfg.sampling_option.num_steps
    disable = None if shown else True  # None: where there is no terminal
    with tqdm(total=total, unit="step", desc=f"{samples} samples", disable=disable) as bar:
        yield bar.update
