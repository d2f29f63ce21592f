"""Random draws that belong to a sample: the same whatever batch, rank or worker the sample falls into.

Order of draws of one sample in a training step. Device stream (`normal`): noise of the autoencoder's posterior for the
video, then for each condition clip (head before tail), time t, flow noise. Host stream (`uniform`): condition, T5
dropout, CLIP dropout. Two streams, because host decisions must not wait for the device.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A well-mixed 63-bit seed from the parts of a key, e.g. (seed, prompt index, sample). Stable across machines."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class SampleRandom:
    """One pair of generators per sample of a batch, seeded by `seeds`; `normal` draws on `device`."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._normal = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        self._uniform = [random.Random(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._normal)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal [B, *shape]: drawn in fp32, then rounded to `dtype`."""
        draws = [torch.randn(tuple(shape), generator=generator, device=self.device) for generator in self._normal]
        return torch.stack(draws).to(dtype)

    def uniform(self) -> list[float]:
        """One number in [0, 1) per sample, on the host."""
        return [generator.random() for generator in self._uniform]

    def select(self, samples: Sequence[int]) -> SampleRandom:
        """The generators of some samples of the batch: shared, so draws through either advance both."""
        chosen = SampleRandom((), self.device)
        chosen._normal = [self._normal[i] for i in samples]
        chosen._uniform = [self._uniform[i] for i in samples]
        return chosen
