"""Seconds by phase of an update, measured where the work runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds spent in each of `phases`.

    On CUDA a phase is timed between two events on the stream, so that timing never makes the host wait; `collect`
    waits for the last of them.

    Attributes:
        phase: the one that the host is in, None between phases; after an error, the one that raised it.
        since: `time.monotonic()` when that began.
    """

    def __init__(self, device: torch.device, phases: Sequence[str]):
        self._device, self._phases = device, phases
        self._host = self._zeros()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._enter(None)

    @contextmanager
    def __call__(self, phase: str, on_device: bool = True) -> Iterator[None]:
        """Time the block as part of `phase`; `on_device=False` for work of the host alone (waiting for data)."""
        self._enter(phase)
        if on_device and self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._host[phase] += time.perf_counter() - begin
        self._enter(None)

    def collect(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        seconds, self._host = self._host, self._zeros()
        if self._events:
            self._events[-1][2].synchronize()
        for phase, begin, end in self._events:
            seconds[phase] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return seconds

    def _enter(self, phase: str | None) -> None:
        self.phase, self.since = phase, time.monotonic()

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys(self._phases, 0.0)
