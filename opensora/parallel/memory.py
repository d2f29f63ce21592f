"""The most memory that a process has held, on its device and on the host."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what Linux takes there for: forget the peak of resident memory


class PeakMemory:
    """Peaks since the last `reset`, in bytes. Without Linux's /proc the host's peak is that of the whole process."""

    def __init__(self, device: torch.device):
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with contextlib.suppress(OSError):
            _CLEAR.write_text(_RESET_PEAK)

    def read(self) -> dict[str, int]:
        """{"host": bytes}, and on CUDA "device": what PyTorch's allocator has given out."""
        peaks = {"host": _host_peak()}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peaks["device"] = torch.cuda.max_memory_allocated(self._device)
        return peaks


def _host_peak() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
