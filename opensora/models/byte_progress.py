"""How far a long read or write of weights has come: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from opensora.common import get_logger, rank

SECONDS_BETWEEN_LINES = 10
SECONDS_WITHOUT_BAR = 2


class ByteProgress:
    """Used in a `with` statement; rank 0 shows it.

    Args:
        what: what is done, "loading ckpts/Open_Sora_v2.safetensors". total: in bytes.
    """

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and rank() == 0:
            unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
            self._bar = tqdm(desc=what, total=total, delay=SECONDS_WITHOUT_BAR, dynamic_ncols=True, leave=False, **unit)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.start

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            left = self.seconds * (self.total - self.done) / self.done
            get_logger().info(f"{self.what}: {size(self.done)} of {size(self.total)}, {left:.0f} s left")

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()


def size(nbytes: float) -> str:
    """A number of bytes for people: "22.1 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
