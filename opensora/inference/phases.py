"""What each phase of a sampling run takes: seconds and peak memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opensora.common import get_logger
from opensora.durable import write_whole
from opensora.parallel.memory import PeakMemory

GIB = 2**30


class PhaseMeter:
    """Adds up the seconds of phases by name, and keeps the highest of their peaks. Phases do not nest."""

    def __init__(self, device: torch.device):
        self._memory = PeakMemory(device)
        self._phases: dict[str, dict[str, Any]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the block as a part of `phase`; on CUDA it ends when the device is done."""
        self._memory.reset()
        begin = time.perf_counter()
        yield
        peaks = {f"peak_{place}_gib": size / GIB for place, size in self._memory.read().items()}  # waits for the device
        seconds = time.perf_counter() - begin
        found = self._phases.setdefault(phase, {"seconds": 0.0, "times": 0})
        found["seconds"] += seconds
        found["times"] += 1
        for name, size in peaks.items():
            found[name] = max(size, found.get(name, 0.0))

    def report(self) -> dict[str, dict[str, Any]]:
        """{phase: {"seconds", "times", "peak_host_gib", on CUDA "peak_device_gib"}}, in order of their first run."""
        return {
            phase: {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
            for phase, found in self._phases.items()
        }

    def log(self) -> None:
        """A line for each phase."""
        for phase, found in self.report().items():
            peaks = [f"{found[f'peak_{p}_gib']:.2f} GiB of {p} memory" for p in ("device", "host") if _has(found, p)]
            get_logger().info(f"{phase:>10}: {found['seconds']:8.2f} s, at most {', '.join(peaks)}")


def _has(found: dict[str, Any], place: str) -> bool:
    return f"peak_{place}_gib" in found


def save_report(path: Path, report: dict[str, Any]) -> None:
    write_whole(path, json.dumps(report, indent=2) + "\n")
