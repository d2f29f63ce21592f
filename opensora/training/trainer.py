"""The training loop."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch

from opensora.checkpoint_folder import list_checkpoints, resolve_checkpoint
from opensora.checkpoint_manifest import has_manifest, problems
from opensora.common import get_logger
from opensora.config import dump_config
from opensora.data.batch import Batch
from opensora.models.lora import check_resumable
from opensora.models.mmdit import MMDiT
from opensora.models.sources import run_settings
from opensora.parallel.context import ParallelContext
from opensora.parallel.shared_batches import receive_batches, send_batches
from opensora.parallel.staging import StagedBatches
from opensora.parallel.timing import PhaseTimer
from opensora.parallel.work import SharedWork
from opensora.settings import parallel_sizes
from opensora.training import callbacks
from opensora.training.background_save import Retention
from opensora.training.build import build_data, build_engine, build_step
from opensora.training.cache_facts import check_seed, open_caches
from opensora.training.checkpoint import Checkpointer, read_running_states
from opensora.training.ema import ExponentialMovingAverage
from opensora.training.memory import naming_failures, read_shrunk, shrink_buckets
from opensora.training.optim import LearningRate
from opensora.training.run_folder import RunFolder, default_experiment_name
from opensora.training.state import TrainState, UpdateMetrics
from opensora.training.whereabouts import Whereabouts

# How long a run that is restarted waits for the folder of the one before.
LOCK_PATIENCE_S = 30.0
PHASES = ("data", "encode", "forward_backward", "optimizer", "checkpoint", "eval")


class Trainer:
    """One run: from a config, and a checkpoint if `load` names one, to the last update.

    Attributes that callbacks may read: cfg, context, state, timer, run_folder, total_updates, resumed_at, whereabouts,
    guard, requests.
    """

    def __init__(self, cfg, context: ParallelContext):
        self.requests = callbacks.Requests()
        try:
            self._build(cfg, context)
        except BaseException:
            self.requests.close()
            raise

    def _build(self, cfg, context: ParallelContext) -> None:
        sizes = parallel_sizes(cfg)
        context = context.share_samples(sizes.tensor, sizes.sequence)
        self.cfg, self.context = cfg, context
        self._folder: RunFolder | None = None
        start = SharedWork(context).on_main(self._find_start)
        checkpoint = start.checkpoint
        if cfg.oom_policy == "shrink":
            shrink_buckets(cfg.bucket_config, context.on_main(lambda: read_shrunk(named_folder(cfg))))
        self.state = TrainState()
        self.guard = callbacks.UpdateGuard(cfg.max_skipped_in_row, cfg.skip_spikes)
        self.resumed_at: int | None = None
        caches = open_caches(cfg)
        self.sampler, self.loader = build_data(cfg, context, caches)
        self._place(start)
        check_seed(caches, self.sampler.seed)
        self.total_updates = self._total_updates()
        self.run_folder = self._open_run_folder(checkpoint)
        self.step = build_step(cfg, context, caches)
        self.engine = build_engine(cfg, context, checkpoint)
        self.ema = ExponentialMovingAverage(self.engine.shards(), cfg.ema_decay) if cfg.ema_decay else None
        self.checkpointer = Checkpointer(
            context,
            self.engine,
            self.ema,
            in_background=cfg.async_io,
            retention=Retention(cfg.keep_n_latest, cfg.keep_every),
            layout={"plugin": cfg.plugin, **cfg.plugin_config},
        )
        # of dropout; ranks with parts of one layer drop the same of the inputs that they share
        torch.manual_seed(cfg.seed + context.rank // context.tensor.size)
        if checkpoint is not None:
            self.checkpointer.load(checkpoint)
        context.on_main(self._cut_run_folder)
        self.timer = PhaseTimer(context.device, PHASES)
        self.whereabouts = Whereabouts(context.rank, self.sampler, self.timer, self.state.global_step)
        self.learning_rate = LearningRate(cfg.optim.lr, cfg.warmup_steps, cfg.use_cosine_scheduler, self.total_updates)
        if context.is_main:
            self.requests.look_for_files(self.run_folder)
        self.callbacks = self._build_callbacks()
        self._log_summary(checkpoint)

    def run(self) -> None:
        """Train until `max_steps` updates or `epochs` epochs are done, or the ranks are asked to stop."""
        try:
            shrinks = self.cfg.oom_policy == "shrink"
            with naming_failures(self.whereabouts, self.run_folder, shrinks, self.checkpointer.wait):
                self._notify("on_start")
                with closing(self._updates()) as updates:
                    for micro_batches in updates:
                        metrics = self._update(micro_batches)
                        self.checkpointer.check()
                        self._notify("on_update", metrics)
                self._notify("on_end")
            self.checkpointer.wait()
        finally:
            self._close()

    def _close(self) -> None:
        """Close everything, whatever fails to: first the checkpointer, which may be writing, last the folder."""
        with ExitStack() as stack:
            if self.context.is_main:
                stack.callback(self._folder.close)
            for callback in reversed(self.callbacks):
                stack.callback(callback.close)
            stack.callback(self.checkpointer.close)

    def save_checkpoint(self) -> Path:
        """Save where the run is now, with `async_io` in the background; every rank calls it."""
        position = {"step": self.state.update * self.cfg.accumulation_steps, "guard": self.guard.state_dict()}
        files = {
            "sampler.json": json.dumps(self.sampler.state_dict(self.state.epoch, self.state.update)),
            "config.txt": dump_config(self.cfg),
        }
        return self.checkpointer.save(self.run_folder, self.state, files, position)

    def _updates(self) -> Iterator[Iterator[Batch]]:
        """The micro-batches of one update after another, until `max_steps` or the last epoch's end."""
        if self.state.global_step >= self.total_updates:
            get_logger().info(f"nothing to do: {self.state.global_step} of {self.total_updates} updates are done")
            return
        with self._batches() as batches:
            while self.cfg.max_steps is None or self.state.global_step < self.cfg.max_steps:
                self.whereabouts.begin_update()
                self._notify("before_update")
                with self.timer("data", on_device=False):
                    first = next(batches, None)
                if first is None:
                    return
                yield self._micro_batches(first, batches)
                if self.requests.stop:
                    return

    @contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        """This rank's micro-batches on the device: read ahead, or given by the rank that reads for several."""
        model, device = self.context.model, self.context.device
        if model.rank > 0:
            yield receive_batches(model, device)
            return
        pixel_size = 1 if self.cfg.dataset.get("resize", "fast") == "fast" else 4  # bytes of a colour's value
        sizes = self.cfg.pin_memory_cache_pre_alloc_numels
        with StagedBatches(iter(self.loader), device, sizes, element_size=pixel_size) as batches:
            yield batches if model.size == 1 else send_batches(batches, model)

    def _micro_batches(self, first: Batch, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield first
        for _ in range(1, self.cfg.accumulation_steps):
            with self.timer("data", on_device=False):
                batch = next(batches)
            yield batch

    def _update(self, micro_batches: Iterator[Batch]) -> UpdateMetrics:
        """One optimizer update from `accumulation_steps` micro-batches on each rank."""
        samples = tokens = 0
        for micro_step, batch in enumerate(micro_batches):
            self.whereabouts.begin_micro_batch(batch)
            self._notify("on_batch", batch)
            with self.timer("encode"):
                inputs = self.step.encode(batch)
            with self.timer("forward_backward"):
                loss = self.engine.forward_backward(
                    lambda model, inputs=inputs: self.step.loss(model, inputs), micro_step, self.cfg.accumulation_steps
                )
            self.whereabouts.losses.append(loss)
            samples += len(batch)
            tokens += inputs.num_tokens(self.step.patch_size)
        loss, samples, tokens = self._over_ranks(samples, tokens)
        with self.timer("optimizer"):
            lr = self.learning_rate(self.state.global_step)
            grad_norm = self.engine.step(lr, lambda norm: self.guard.accepts(loss, norm))
            if self.ema and self.guard.accepted:
                self.ema.update()
        self.state.advance(batch.epoch, batch.update, samples)
        return UpdateMetrics(
            step=self.state.global_step,
            epoch=self.state.epoch,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            samples=samples,
            tokens=tokens,
            seconds={phase: round(seconds, 6) for phase, seconds in self.timer.collect().items()},
            skipped=self.guard.skipped,
            clip=(batch.num_frames, *inputs.latents.shape[-2:]),
        )

    def _over_ranks(self, samples: int, tokens: int) -> tuple[float, int, int]:
        """(mean loss, samples, tokens) of the update over all ranks; in the same sum they agree on what they are asked
        for."""
        loss = torch.stack(self.whereabouts.losses).sum()
        others = torch.tensor([samples, tokens, *self.requests.take()], dtype=torch.float64, device=self.context.device)
        sums = self.context.sum_over_all(torch.cat([loss.double()[None], others])).tolist()
        self.requests.agree(*sums[3:])
        copies = self.context.world_size // self.context.data_parallel_size  # ranks that see the same samples
        loss = sums[0] / (self.context.world_size * self.cfg.accumulation_steps)
        return loss, round(sums[1] / copies), round(sums[2] / copies)

    def _place(self, start: Start) -> None:
        """Set where data and counters start: the checkpoint's place, and over it `start_epoch` and `start_step`."""
        start_epoch, start_step = (None, None) if start.goes_on else (self.cfg.start_epoch, self.cfg.start_step)
        restart, checkpoint = start_epoch is not None or start_step is not None, start.checkpoint
        if checkpoint is not None:
            running = read_running_states(checkpoint)
            self.resumed_at = running["global_step"]
            self.state.global_step, self.state.samples = running["global_step"], running["samples"]
            if "guard" in running:
                self.guard.load_state_dict(running["guard"])
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

    def _find_start(self) -> Start:
        """On rank 0: where the run starts. A folder that is there is held first: the run that is ending in it may save
        once more, and remove what would have been found."""
        if self.cfg.exp_name and named_folder(self.cfg).is_dir():
            self._hold(named_folder(self.cfg))
        return find_start(self.cfg)

    def _hold(self, path: Path) -> None:
        self._folder = RunFolder(path, LOCK_PATIENCE_S if self.cfg.auto_resume else 0.0)

    def _cut_run_folder(self) -> None:
        self._folder.cut_metrics(self.state.global_step)
        self._folder.cut_checkpoints(self.state.global_step)

    def _open_run_folder(self, checkpoint: Path | None) -> Path:
        """The run's folder, made and locked on rank 0, known to all. Only a checkpoint of its own continues a folder:
        one of another run would mix two runs' metrics and checkpoints."""
        cfg = self.cfg

        def open_folder() -> Path:
            if self._folder is None:
                self._hold(Path(cfg.outputs) / (cfg.exp_name or default_experiment_name(cfg.filename, datetime.now())))
            if checkpoint is None or checkpoint.resolve().parent != self._folder.path.resolve():
                self._folder.check_new()
            self._folder.write_config(dump_config(cfg))
            self._folder.start_log()
            return self._folder.path

        return self.context.on_main(open_folder)

    def _build_callbacks(self) -> list[callbacks.Callback]:
        cfg, folder = self.cfg, self.run_folder
        found = [callbacks.Watchdog(folder, self.whereabouts, self.timer, cfg.dist_timeout)]
        found += [callbacks.GarbageCollection(), callbacks.RejectedSamples(folder)]
        if self.context.is_main:
            found += [
                callbacks.Layout(),
                callbacks.MetricsFile(folder),
                callbacks.TensorBoard(folder, cfg.log_every, self.state.global_step),
                callbacks.Progress(cfg.log_every),
                callbacks.EvaluationFile(folder),
            ]
            if cfg.wandb:
                config = json.loads(dump_config(cfg))
                found.append(callbacks.WeightsAndBiases(folder, cfg.log_every, cfg.wandb_project, config))
        evaluations = [callbacks.Evaluations(cfg.eval_every, found)] if cfg.eval_every else []
        checkpoints = callbacks.Checkpoints(cfg.ckpt_every)
        return [*found, callbacks.CutCaptions(), self.guard, checkpoints, *evaluations, self.requests]

    def _notify(self, moment: str, *facts) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *facts)

    def _log_summary(self, checkpoint: Path | None) -> None:
        log = get_logger()
        log.info(f"run folder: {self.run_folder}")
        if checkpoint is not None:
            place = f"epoch {self.state.epoch}, update {self.state.global_step}"
            log.info(f"resumed from {checkpoint} ({place}): weights, optimizer, random numbers, position")
        elif self.cfg.model.get("from_pretrained"):
            log.info(
                f"starts anew from the weights alone of {self.cfg.model.from_pretrained} (--model.from_pretrained): "
                "optimizer, step and data begin at 0"
            )


# How the weights are laid out, and with them the optimizer's state, which is not converted.
LAYOUT = ("fused_qkv", "use_liger_rope")


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        checkpoint: None starts anew. goes_on: it is the run's own, which `auto_resume` found; what `start_epoch` and
            `start_step` say was done when the run began.
    """

    checkpoint: Path | None
    goes_on: bool = False


def named_folder(cfg) -> Path:
    """The run folder of a config that has `exp_name`."""
    return Path(cfg.outputs) / cfg.exp_name


def find_start(cfg) -> Start:
    """With `auto_resume` the newest checkpoint of the run's own folder, if it has one; else what `load` names."""
    if cfg.auto_resume and list_checkpoints(named_folder(cfg)):
        if cfg.load:
            get_logger().info(
                "auto_resume: going on from the run's own newest checkpoint; --load is for its first start"
            )
        return Start(find_checkpoint(cfg, named_folder(cfg)), goes_on=True)
    return Start(find_checkpoint(cfg) if cfg.load else None)


def find_checkpoint(cfg, load: str | list[str] | Path | None = None) -> Path:
    """The checkpoint that `load`, or else the config's, names; ValueError if it is not of what the config trains."""
    if cfg.verify_checkpoint:
        get_logger().info("reading the checkpoint for its checksums (--verify-checkpoint False compares sizes alone)")
    checkpoint = resolve_checkpoint(load or cfg.load, lambda found: problems(found, cfg.verify_checkpoint))
    if not has_manifest(checkpoint):
        get_logger().info(f"{checkpoint} has no manifest (an older version wrote it): its files are taken as they are")
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
