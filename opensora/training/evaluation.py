"""How good the weights are while they are trained: samples of fixed prompts, and the loss of fixed samples.

Training goes on after it as if there had been none. The evaluated weights are the averages where a run keeps them, the
random generators are put back, and what only evaluation needs (a decoder, encoded samples) waits on the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from opensora.common import get_logger, to_torch_dtype
from opensora.data.bucket import BucketTable
from opensora.data.loader import VideoTextDataset
from opensora.models.frozen import build_frozen
from opensora.parallel.averages import averaged_weights
from opensora.parallel.context import ParallelContext
from opensora.parallel.engine import Engine
from opensora.parallel.random_state import undisturbed_random_state
from opensora.registry import AUTOENCODERS, DATASETS
from opensora.training.build import build_text_encoders
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.encoders import TextEncoders, VideoEncoder
from opensora.training.held_out import HeldOutLoss, Losses, choose_rows
from opensora.training.prompt_samples import DrawnSample, PromptSamples, read_prompts
from opensora.training.step import FlowMatchingStep

FOLDER = "eval"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        step: updates done.
        averaged: whether it is of the averaged weights.
        losses: None if no loss was asked for.
        samples: of all ranks.
        seconds: that it took.
    """

    step: int
    averaged: bool
    losses: Losses | None
    samples: list[DrawnSample]
    seconds: float


class Evaluator:
    """Evaluates a run's weights. Every rank makes one and calls it.

    Args:
        dataset: what is trained on: the held-out samples are some of it if `eval_data_path` names no other table.
        step: of training. Text encoders that it does not hold are built for the time of this call alone.
    """

    def __init__(self, cfg, context: ParallelContext, dataset: VideoTextDataset, step: FlowMatchingStep):
        self._compiled, self._context = cfg.model.compile, context
        dtype = to_torch_dtype(cfg.dtype)
        with undisturbed_random_state(context.device):
            self._autoencoder = build_frozen(AUTOENCODERS, _uncompiled(cfg.ae), "ae", dtype, "cpu")
            with _text_encoders(cfg, step, context.device) as encoders:
                text = TextEncoders(**encoders, dropout={}, dtype=dtype)
                with self._autoencoder_on_device():
                    self._held_out = self._build_held_out(cfg, dataset, step, text) if cfg.eval_samples else None
                prompts = read_prompts(cfg.eval_prompts)
                self._samples = prompts and PromptSamples(cfg, prompts, text, self._autoencoder, context)
        del text, encoders
        torch.cuda.empty_cache()

    def _build_held_out(
        self, cfg, dataset: VideoTextDataset, step: FlowMatchingStep, text: TextEncoders
    ) -> HeldOutLoss:
        context = self._context
        video = VideoEncoder(self._autoencoder, context.device, text.dtype)
        if cfg.eval_data_path:
            settings = {**cfg.dataset, "data_path": cfg.eval_data_path, "memory_efficient": False}
            dataset = DATASETS.build(settings, where="dataset")
        else:
            get_logger().info("eval_data_path is not set: the evaluated loss is of samples that are trained on too")
        buckets = BucketTable(cfg.bucket_config, dataset.fps_max, cfg.ae_spatial_compression)
        batches = choose_rows(dataset, buckets, cfg.eval_samples, cfg.seed, context.data_parallel_size)
        encode, in_worker = step.with_encoders(video, text).encode, cfg.num_workers > 0
        return HeldOutLoss(dataset, batches, encode, step, cfg.eval_times, cfg.seed, context, in_worker)

    def __call__(self, engine: Engine, ema: ExponentialMovingAverage | None, run_folder: Path, step: int) -> Evaluation:
        """Evaluate the weights after `step` updates; files go under `run_folder`."""
        begin = time.perf_counter()
        with self._evaluating(engine, ema) as model:
            losses = self._held_out and self._held_out(model)
            samples = self._samples and self._draw(model, run_folder / FOLDER / f"step{step:07d}")
        return Evaluation(step, ema is not None, losses, samples, time.perf_counter() - begin)

    def _draw(self, model: nn.Module, folder: Path) -> list[DrawnSample]:
        with self._autoencoder_on_device():
            return self._samples.draw(model, folder)

    @contextmanager
    def _evaluating(self, engine: Engine, ema: ExponentialMovingAverage | None) -> Iterator[nn.Module]:
        """The model with the weights to evaluate, in evaluation mode."""
        model = engine.module
        with ExitStack() as stack:
            stack.enter_context(undisturbed_random_state(self._context.device))
            stack.enter_context(averaged_weights(engine, ema and ema.flats()))
            stack.enter_context(torch.no_grad())
            if self._compiled:  # graphs for other shapes and without gradients would count towards torch's limit
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            was_training = model.training
            model.eval()
            yield model
            model.train(was_training)

    @contextmanager
    def _autoencoder_on_device(self) -> Iterator[None]:
        torch.cuda.empty_cache()  # nothing without a CUDA device
        self._autoencoder.to(self._context.device)
        yield
        self._autoencoder.to("cpu")
        torch.cuda.empty_cache()


@contextmanager
def _text_encoders(cfg, step: FlowMatchingStep, device: torch.device) -> Iterator[dict[str, nn.Module]]:
    """Training's, where it has them, which do not count what they encode here; else others."""
    encoders = step.text.encoders or build_text_encoders(cfg, device).encoders
    counted = [(encoder, encoder.texts_seen, encoder.texts_cut, encoder.tokens_cut) for encoder in encoders.values()]
    yield encoders
    for encoder, *counts in counted:
        encoder.texts_seen, encoder.texts_cut, encoder.tokens_cut = counts


def _uncompiled(ae: dict) -> dict:
    return {**ae, "compile": False} if "compile" in ae else dict(ae)
