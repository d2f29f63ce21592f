"""Model calls left out where a velocity would hardly change: the last one computed stands in for it.

Along a trajectory the velocity changes about in proportion to the latents. Each computed call tells by how much:
gain = |v - v'| / |x - x'|, against the call computed before it (mean absolute values). At a new x the relative change
of v since the last computed call is estimated as gain * |x - x'| / |v'|, and below a threshold v' is used. Only the
model's inputs and outputs are looked at, so this needs no second pass, and nothing of the model's inside.

The idea of reusing by an estimated change is TeaCache's (Liu et al. 2024, arXiv:2411.19108), that of taking the
estimate from measured outputs EasyCache's (Zhou et al. 2025, arXiv:2507.02860).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

# velocity(x [N, L, D], t, branch, rows) -> [N, L, D]; rows: the places in the batch that x has, None for all
Velocity = Callable[[Tensor, float, Hashable, Tensor | None], Tensor]


@dataclass
class _Known:
    """The last computed call of each sample: its latents x, velocity v [B, L, D], and gain [B] (infinite: unknown).

    What has no call yet (not `seen` [B]) has v = 0, of which any change is no number or infinite: it is computed.
    """

    x: Tensor
    v: Tensor
    gain: Tensor
    seen: Tensor

    @classmethod
    def nothing(cls, x: Tensor) -> _Known:
        gain = x.new_full((len(x),), torch.inf)
        return cls(x, torch.zeros_like(x), gain, torch.zeros_like(gain, dtype=torch.bool))


class StepCache:
    """Calls `compute` for those samples of a batch, and of a guidance branch, that need it.

    Each sample decides for itself, so a result does not depend on the batch.

    threshold: relative change below which a velocity is used again; None: never, and nothing is kept.
    agree: among ranks that share a model, and so its calls, gives the first one's estimates: each rank's own may
        differ in the last bit.

    Attributes:
        asked, computed: velocities of single samples so far.
    """

    def __init__(
        self, compute: Velocity, threshold: float | None, agree: Callable[[Tensor], Tensor] = lambda values: values
    ):
        self._compute, self._threshold, self._agree = compute, threshold, agree
        self._known: dict[Hashable, _Known] = {}
        self.asked = self.computed = 0

    @property
    def reused(self) -> float:
        """The share of velocities that were not computed."""
        return 1 - self.computed / self.asked if self.asked else 0.0

    def __call__(self, x: Tensor, t: float, branch: Hashable, rows: Tensor | None = None) -> Tensor:
        """The velocities [N, L, D] at x [B, L, D] of the samples `rows` [N], None: of all."""
        asked = len(x) if rows is None else len(rows)
        self.asked += asked
        if self._threshold is None:
            self.computed += asked
            return self._compute(x if rows is None else x[rows], t, branch, rows)
        known = self._known.setdefault(branch, _Known.nothing(x))
        change = self._agree(known.gain * _size(x - known.x) / _size(known.v))  # [B]
        stale = ~(change < self._threshold)
        if rows is not None:
            stale &= torch.zeros_like(stale).index_fill(0, rows, True)
        changed = torch.nonzero(stale)[:, 0]
        self.computed += len(changed)
        if len(changed):
            self._update(known, x, t, branch, changed)
        return known.v if rows is None else known.v[rows]

    def _update(self, known: _Known, x: Tensor, t: float, branch: Hashable, rows: Tensor) -> None:
        some = len(rows) < len(x)
        new_x, old_x, old_v = (x[rows], known.x[rows], known.v[rows]) if some else (x, known.x, known.v)
        new_v = self._compute(new_x, t, branch, rows if some else None)
        gain = _size(new_v - old_v) / _size(new_x - old_x)
        known.x = known.x.index_copy(0, rows, new_x)
        known.v = known.v.index_copy(0, rows, new_v)
        known.gain = known.gain.index_copy(0, rows, torch.where(known.seen[rows], gain, torch.inf))
        known.seen = known.seen.index_fill(0, rows, True)


def _size(x: Tensor) -> Tensor:
    """Mean absolute value of each sample, [B, L, D] -> [B]."""
    return x.abs().mean(dim=(1, 2))
