"""Updates that would do harm are not made."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from opensora.common import get_logger
from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics
from opensora.training.whereabouts import Whereabouts

# Gradient norms that a spike is measured against: of the last so many updates that were made, once there are enough.
_WINDOW, _ENOUGH = 100, 20
# Ranks whose batches are named.
_LISTED = 8


class UpdateGuard(Callback):
    """Skips updates whose loss or gradient is not finite, or whose gradient is a spike.

    A skipped update leaves weights, optimizer and average as they are, but it is counted: the data goes on, and the
    learning rate and the cadence of checkpoints stay functions of the update's number, so a resume is exact. All ranks
    decide alike, from the loss and the gradient norm over all of them.

    Args:
        max_in_row: stop the run when so many in a row are skipped.
        spikes: a norm over so many times the median of the last 100 is a spike; None skips none.

    Attributes:
        skipped: updates skipped in the run. accepted: whether the last one was made.
    """

    def __init__(self, max_in_row: int, spikes: float | None):
        self._max_in_row, self._spikes = max_in_row, spikes
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._in_row = self.skipped = 0
        self.accepted, self._reason = True, ""

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether to make the update with this loss and gradient norm."""
        self._reason = self._objection(loss, norm)
        self.accepted = not self._reason
        if self.accepted:
            self._norms.append(norm)
            self._in_row = 0
        else:
            self._in_row += 1
            self.skipped += 1
        return self.accepted

    def _objection(self, loss: float, norm: float) -> str:
        values = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"{values}: not finite"
        if self._spikes is not None and len(self._norms) >= _ENOUGH:
            median = statistics.median(self._norms)
            if norm > self._spikes * median:
                return f"{values}: over skip_spikes={self._spikes:g} times the median norm {median:.4g}"
        return ""

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if self.accepted:
            return
        place = trainer.whereabouts
        everyone = trainer.context.gather_objects((all(map(torch.isfinite, place.losses)), self._batches(place)))
        culprits = [batches for finite, batches in everyone if not finite]  # none, if it shows in the gradient alone
        named = culprits or [batches for _, batches in everyone]
        more = f"; and of {len(named) - _LISTED} more ranks" if len(named) > _LISTED else ""
        batches = "; ".join(named[:_LISTED]) + more
        diagnosis = f"update {metrics.step} was skipped ({self._reason}); its batches: {batches}"
        if self._in_row < self._max_in_row:
            if trainer.context.is_main:
                get_logger().warning(diagnosis)
            return
        raise ValueError(
            f"{self._in_row} updates in a row were skipped (max_skipped_in_row={self._max_in_row}), the weights are as "
            f"before them. The last: {diagnosis}. Look at these samples; or go on from an older checkpoint with a "
            "lower lr, a longer warmup_steps or another seed"
        )

    def _batches(self, place: Whereabouts) -> str:
        done = zip(place.micro_batches, place.losses, strict=True)
        return f"rank {place.rank}: " + " | ".join(f"loss {float(loss):.4g}, {place.describe(b)}" for b, loss in done)

    def state_dict(self) -> dict[str, Any]:
        """What decides the next update (plain values for JSON)."""
        return {"skipped": self.skipped, "in_row": self._in_row, "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._in_row = state["skipped"], state["in_row"]
        self._norms = deque(state["norms"], maxlen=_WINDOW)
