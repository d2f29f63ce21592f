"""The training loop."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import torch

from opensora.checkpoint_folder import resolve_checkpoint
from opensora.common import get_logger
from opensora.config import dump_config
from opensora.data.batch import Batch
from opensora.models.lora import check_resumable
from opensora.models.mmdit import MMDiT
from opensora.models.sources import run_settings
from opensora.parallel.context import ParallelContext
from opensora.parallel.staging import StagedBatches
from opensora.parallel.timing import PhaseTimer
from opensora.training import callbacks
from opensora.training.build import build_data, build_engine, build_step
from opensora.training.cache_facts import open_caches
from opensora.training.checkpoint import Checkpointer, prune, read_running_states
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.optim import LearningRate
from opensora.training.run_folder import RunFolder, default_experiment_name
from opensora.training.state import TrainState, UpdateMetrics

PHASES = ("data", "encode", "forward_backward", "optimizer", "checkpoint")


class Trainer:
    """One run: from a config, and a checkpoint if `load` names one, to the last update.

    Attributes that callbacks may read: cfg, context, state, timer, run_folder, total_updates, resumed_at.
    """

    def __init__(self, cfg, context: ParallelContext):
        self.cfg, self.context = cfg, context
        checkpoint = context.on_main(lambda: find_checkpoint(cfg)) if cfg.load else None
        self.state = TrainState()
        self.resumed_at: int | None = None
        caches = open_caches(cfg)
        self.sampler, self.loader = build_data(cfg, context, caches)
        self._place(checkpoint)
        self.total_updates = self._total_updates()
        self.run_folder = self._open_run_folder(checkpoint)
        self.step = build_step(cfg, context.device, caches)
        self.engine = build_engine(cfg, context, checkpoint)
        self.ema = ExponentialMovingAverage(self.engine.shards(), cfg.ema_decay) if cfg.ema_decay else None
        self.checkpointer = Checkpointer(context, self.engine, self.ema)
        torch.manual_seed(cfg.seed + context.rank)
        if checkpoint is not None:
            self.checkpointer.load(checkpoint)
        self.timer = PhaseTimer(context.device, PHASES)
        self.learning_rate = LearningRate(cfg.optim.lr, cfg.warmup_steps, cfg.use_cosine_scheduler, self.total_updates)
        self.callbacks = self._build_callbacks()
        self._log_summary(checkpoint)

    def run(self) -> None:
        """Train until `max_steps` updates or `epochs` epochs are done."""
        try:
            self._notify("on_start")
            with closing(self._updates()) as updates:
                for micro_batches in updates:
                    metrics = self._update(micro_batches)
                    self._notify("on_update", metrics)
            self._notify("on_end")
        finally:
            for callback in self.callbacks:
                callback.close()
            if self.context.is_main:
                self._folder.close()

    def save_checkpoint(self) -> Path:
        """Save where the run is now; every rank calls it."""
        position = {"step": self.state.update * self.cfg.accumulation_steps}
        files = {
            "sampler.json": json.dumps(self.sampler.state_dict(self.state.epoch, self.state.update)),
            "config.txt": dump_config(self.cfg),
        }
        folder = self.checkpointer.save(self.run_folder, self.state, files, position)
        if self.context.is_main:
            prune(self.run_folder, self.cfg.keep_n_latest)
        return folder

    def _updates(self) -> Iterator[Iterator[Batch]]:
        """The micro-batches of one update after another, until `max_steps` or the last epoch's end."""
        if self.state.global_step >= self.total_updates:
            get_logger().info(f"nothing to do: {self.state.global_step} of {self.total_updates} updates are done")
            return
        with self._stage(iter(self.loader)) as batches:
            while self.cfg.max_steps is None or self.state.global_step < self.cfg.max_steps:
                with self.timer("data", on_device=False):
                    first = next(batches, None)
                if first is None:
                    return
                yield self._micro_batches(first, batches)

    def _stage(self, batches: Iterator[Batch]) -> StagedBatches:
        pixel_size = 1 if self.cfg.dataset.get("resize", "fast") == "fast" else 4  # bytes of a colour's value
        return StagedBatches(
            batches, self.context.device, self.cfg.pin_memory_cache_pre_alloc_numels, element_size=pixel_size
        )

    def _micro_batches(self, first: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield first
        for _ in range(1, self.cfg.accumulation_steps):
            with self.timer("data", on_device=False):
                batch = next(batches)
            yield batch

    def _update(self, micro_batches: Iterator[Batch]) -> UpdateMetrics:
        """One optimizer update from `accumulation_steps` micro-batches on each rank."""
        loss_sum = torch.zeros((), device=self.context.device)
        samples = tokens = 0
        for micro_step, batch in enumerate(micro_batches):
            self._notify("on_batch", batch)
            with self.timer("encode"):
                inputs = self.step.encode(batch)
            with self.timer("forward_backward"):
                loss = self.engine.forward_backward(
                    lambda model, inputs=inputs: self.step.loss(model, inputs), micro_step, self.cfg.accumulation_steps
                )
            loss_sum += loss
            samples += len(batch)
            tokens += inputs.num_tokens(self.step.patch_size)
        with self.timer("optimizer"):
            lr = self.learning_rate(self.state.global_step)
            grad_norm = self.engine.step(lr)
            if self.ema:
                self.ema.update()
        counts = torch.tensor([samples, tokens], dtype=torch.float64, device=self.context.device)
        loss, samples, tokens = self.context.sum(torch.cat([loss_sum.double()[None], counts])).tolist()
        self.state.advance(batch.epoch, batch.update, int(samples))
        return UpdateMetrics(
            step=self.state.global_step,
            epoch=self.state.epoch,
            loss=loss / (self.context.data_parallel_size * self.cfg.accumulation_steps),
            grad_norm=grad_norm,
            lr=lr,
            samples=int(samples),
            tokens=int(tokens),
            seconds={phase: round(seconds, 6) for phase, seconds in self.timer.collect().items()},
        )

    def _place(self, checkpoint: Path | None) -> None:
        """Set where data and counters start: the checkpoint's place, and over it `start_epoch` and `start_step`."""
        start_epoch, start_step = self.cfg.start_epoch, self.cfg.start_step
        restart = start_epoch is not None or start_step is not None
        if checkpoint is not None:
            running = read_running_states(checkpoint)
            self.resumed_at = running["global_step"]
            self.state.global_step, self.state.samples = running["global_step"], running["samples"]
            if start_epoch is None:
                start_epoch = running["epoch"]
            if not restart:
                self.sampler.load_state_dict(json.loads((checkpoint / "sampler.json").read_text()))
        if restart:
            self.sampler.start_at(start_epoch or 0, start_step or 0)
        self.state.epoch, self.state.update = self.sampler.position

    def _total_updates(self) -> int:
        """Updates done when the run ends: what is left of the data, but no more than `max_steps`."""
        state, epochs_left = self.state, self.cfg.epochs - self.state.epoch
        per_epoch = self.sampler.len_epoch(state.epoch)  # of other epochs it may differ, if buckets are drawn
        total = state.global_step + max(0, epochs_left * per_epoch - state.update)
        return total if self.cfg.max_steps is None else min(total, self.cfg.max_steps)

    def _open_run_folder(self, checkpoint: Path | None) -> Path:
        """The run's folder, made and locked on rank 0, known to all. Only a checkpoint of its own continues a folder:
        one of another run would mix two runs' metrics and checkpoints."""
        cfg = self.cfg

        def open_folder() -> Path:
            name = cfg.exp_name or default_experiment_name(cfg.filename, datetime.now())
            path = Path(cfg.outputs) / name
            resumes = checkpoint is not None and checkpoint.resolve().parent == path.resolve()
            self._folder = RunFolder(path, resumes)
            self._folder.write_config(dump_config(cfg))
            self._folder.cut_metrics(self.state.global_step)
            self._folder.start_log()
            return self._folder.path

        return self.context.on_main(open_folder)

    def _build_callbacks(self) -> list[callbacks.Callback]:
        cfg, found = self.cfg, [callbacks.GarbageCollection(), callbacks.RejectedSamples(self.run_folder)]
        if self.context.is_main:
            found += [
                callbacks.MetricsFile(self.run_folder),
                callbacks.TensorBoard(self.run_folder, cfg.log_every, self.state.global_step),
                callbacks.Progress(cfg.log_every),
            ]
            if cfg.wandb:
                config = json.loads(dump_config(cfg))
                found.append(callbacks.WeightsAndBiases(self.run_folder, cfg.log_every, cfg.wandb_project, config))
        return [*found, callbacks.CutCaptions(), callbacks.Checkpoints(cfg.ckpt_every)]

    def _notify(self, moment: str, *facts) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *facts)

    def _log_summary(self, checkpoint: Path | None) -> None:
        log, context = get_logger(), self.context
        parameters = sum(p.numel() for p in self.engine.module.parameters())
        trained = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        log.info(f"run folder: {self.run_folder}")
        log.info(f"{context.world_size} ranks on {context.device.type}, plugin {self.cfg.plugin}, {self.cfg.dtype}")
        log.info(
            f"model: {parameters:,} parameters" + (f", {trained:,} of them trained" if trained < parameters else "")
        )
        if checkpoint is not None:
            place = f"epoch {self.state.epoch}, update {self.state.global_step}"
            log.info(f"resumed from {checkpoint} ({place}): weights, optimizer and position")


# How the weights are laid out, and with them the optimizer's state, which is not converted.
LAYOUT = ("fused_qkv", "use_liger_rope")


def find_checkpoint(cfg) -> Path:
    """The checkpoint that `load` names; ValueError if it does not hold what the config trains."""
    checkpoint = resolve_checkpoint(cfg.load)
    check_resumable(checkpoint, cfg.lora_config)
    trained = run_settings(checkpoint)
    for key in LAYOUT:
        default = inspect.signature(MMDiT).parameters[key].default
        saved, asked = trained.get(key, default), cfg.model.get(key, default)
        if trained and saved != asked:
            raise ValueError(
                f"model.{key}={asked}, but --load {checkpoint} was trained with {saved}: set it so, or start from its "
                f"weights alone with --model.from_pretrained {checkpoint}"
            )
    return checkpoint
