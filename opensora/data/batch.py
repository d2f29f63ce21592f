"""What the loader hands to the training step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of a rank: clips of one bucket.

    Attributes:
        video: [B, 3, T, H, W] on the host: uint8 RGB, or with `resize="exact"` float32 in [-1, 1].
        text: [B] captions as the encoders get them.
        index: [B] rows of the table that were read; a substitute's row where a sample could not be read.
        fps: [B] frames per second of the clips, 0 where unknown (images).
        seed: [B] 63-bit seeds keyed by (seed, epoch, index): all that is random about a sample follows from its own.
        epoch, update, micro_step: the place in the sampler's plan.
        rejected: the samples that could not be read: {"path", "index", "reason", "replaced_by"}.
    """

    video: Tensor
    text: list[str]
    index: list[int]
    fps: list[float]
    seed: list[int]
    epoch: int
    update: int
    micro_step: int
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def pin_memory(self) -> Batch:
        """With the video in page-locked memory, from which it can be sent to a GPU in the background."""
        return replace(self, video=self.video.pin_memory())
