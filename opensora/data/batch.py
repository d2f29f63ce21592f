"""What the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of a rank: clips of one bucket.

    Attributes:
        video: [B, 3, T, H, W]: uint8 RGB, or with `resize="exact"` float32 in [-1, 1]; None if `encoded` has latents.
        text: [B] captions as the encoders get them.
        index: [B] rows of the table that were read; a substitute's row where a sample could not be read.
        fps: [B] frames per second of the clips, 0 where unknown (images).
        seed: [B] 63-bit seeds keyed by (seed, epoch, index): all that is random about a sample follows from its own.
        epoch, update, micro_step: the place in the sampler's plan.
        rejected: the samples that could not be read: {"path", "index", "reason", "replaced_by"}.
        encoded: [B, ...] what the frozen encoders made of the samples before, by name (see `data.cache`).
        num_frames: T of the clips.
    """

    video: Tensor | None
    text: list[str]
    index: list[int]
    fps: list[float]
    seed: list[int]
    epoch: int
    update: int
    micro_step: int
    rejected: list[dict[str, Any]] = field(default_factory=list)
    encoded: dict[str, Tensor] = field(default_factory=dict)
    num_frames: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor moved by `move`."""
        video = None if self.video is None else move(self.video)
        return replace(self, video=video, encoded={name: move(tensor) for name, tensor in self.encoded.items()})
