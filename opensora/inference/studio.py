"""One loaded model that draws samples on demand: what a page for people, or a notebook, needs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora.common import to_torch_dtype
from opensora.inference.output import check_writable, save_sample
from opensora.inference.pipeline import Pipeline
from opensora.inference.plan import locate_weights, plan_samples, tags_of, to_request
from opensora.inference.sampler import SamplerOptions
from opensora.inference.settings import validate
from opensora.inference.size import sample_size

FOLDER = "studio"


@dataclass(frozen=True)
class Wish:
    """One sample that is asked for. None is what the config says.

    Attributes:
        references: paths of images or videos, with a `cond_type` other than "t2v".
        motion_score: "" is none.
        option: what is to be changed of `sampling_option` (num_frames, num_steps, guidance, ...). A resolution takes
            the place of height and width.
    """

    prompt: str
    negative: str | None = None
    cond_type: str = "t2v"
    references: tuple[str, ...] = ()
    motion_score: str | None = None
    seed: int | None = None
    option: dict[str, Any] | None = None


class Studio:
    """Loads what a config names and draws one sample at a time, each as `scripts/diffusion/inference.py` would.

    Samples go to `save_dir`/studio/NUMBER. Calls of several threads wait for each other.
    """

    def __init__(self, cfg, device: torch.device):
        self._cfg, self._device = cfg, device
        check_writable(Path(cfg.save_dir), "save_dir")
        self._located = locate_weights(cfg)
        self._pipeline = Pipeline.from_config(cfg, sample_size(cfg), *self._located, device)
        self._lock = threading.Lock()

    def draw(self, wish: Wish, on_step: Callable[[], None] = lambda: None) -> Path:
        """Draw and write a sample, mp4 or png; on_step is called after each of its steps.

        Raises:
            ValueError, FileNotFoundError: the wish does not fit the model, or a reference can't be read.
        """
        with self._lock, self._new_folder() as folder:
            cfg = self._config(wish, folder)
            validate(cfg, world_size=1)
            plan = plan_samples(cfg, *self._located)
            (job,) = plan.jobs
            request = to_request(job, cfg, plan.size)
            (frames,) = self._pipeline_for(cfg, plan.size)([request], on_step)
            tags = tags_of(job, request, cfg, plan.model_files)
            save_sample(job.path, frames, cfg.fps_save, cfg.crf, job.prompt.text, tags)
            return job.path

    def _pipeline_for(self, cfg, size) -> Pipeline:
        """The loaded models, for samples of another size and other options."""
        loaded = self._pipeline
        return Pipeline(
            loaded.sampler.model,
            loaded.autoencoder,
            loaded.t5,
            loaded.clip,
            options=SamplerOptions.from_config(cfg.sampling_option),
            size=size,
            device=self._device,
            dtype=to_torch_dtype(cfg.dtype),
            offload=cfg.offload,
        )

    def _config(self, wish: Wish, save_dir: Path):
        """The studio's config with a wish as its only prompt."""
        cfg = copy.deepcopy(self._cfg)
        cfg.prompt, cfg.cond_type, cfg.save_dir = wish.prompt, wish.cond_type, str(save_dir)
        cfg.ref, cfg.start_index, cfg.end_index, cfg.num_sample = ";".join(wish.references) or None, 0, None, 1
        cfg.neg = cfg.neg if wish.negative is None else wish.negative
        if wish.motion_score is not None:
            cfg.motion_score = wish.motion_score or None
        changed = {**(wish.option or {}), "seed": wish.seed}
        changed = {name: value for name, value in changed.items() if value is not None}
        if "resolution" in changed:
            changed = {"height": None, "width": None, **changed}
        cfg.sampling_option.update(changed)
        return cfg

    @contextmanager
    def _new_folder(self) -> Iterator[Path]:
        """A folder of the next number, which is gone again where nothing came of the wish."""
        parent = Path(self._cfg.save_dir) / FOLDER
        numbers = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
        folder = parent / f"{max(numbers, default=0) + 1:05d}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            for made in (*folder.iterdir(), folder):
                with suppress(OSError):  # it holds something
                    made.rmdir()
