"""Where a run is: what is counted, and nothing that can be derived."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        epoch: the epoch of the next update.
        update: updates done in that epoch.
        global_step: updates done in the run; the learning rate, EMA, `max_steps` and `ckpt_every` count these.
        samples: samples trained on in the run, on all ranks.
    """

    epoch: int = 0
    update: int = 0
    global_step: int = 0
    samples: int = 0

    def advance(self, epoch: int, update: int, samples: int) -> None:
        """Count update number `update` of `epoch` as done."""
        self.epoch, self.update = epoch, update + 1
        self.global_step += 1
        self.samples += samples


@dataclass(frozen=True)
class UpdateMetrics:
    """What one optimizer update did, over all ranks.

    Attributes:
        step: updates done, this one included.
        loss: mean over the micro-batches of all ranks.
        grad_norm: global L2 norm before clipping.
        samples, tokens: in this update; tokens are text and video tokens of the transformer.
        seconds: by phase, on rank 0; `checkpoint` is the time of the save before this update, if there was one.
        skipped: updates of the run so far that were counted but not made (see `callbacks.UpdateGuard`).
        clip: frames, and height and width in latents, of the clips of rank 0's last micro-batch.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    seconds: dict[str, float]
    skipped: int = 0
    clip: tuple[int, ...] = ()
