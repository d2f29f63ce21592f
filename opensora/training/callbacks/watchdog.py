"""A thread beside each rank that sees when an update does not get on."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from datetime import datetime
from pathlib import Path

from opensora.common import get_logger
from opensora.parallel.timing import PhaseTimer
from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics
from opensora.training.whereabouts import Whereabouts

# An update is slow if it takes so many times the median of those of like clips, and not less than so many seconds.
_SLOW, _LEAST_S = 10, 1.0
# The median is one of at least and at most so many updates. The first ones of a bucket may compile kernels.
_ENOUGH, _WINDOW = 3, 50
# The other ranks wait for the same thing: time for them to say where, before the launcher ends them.
_OTHERS_S = 5.0
# No thread runs while one never lets go of the interpreter. Then the stacks come so much later, from C, on stderr.
_LATER_S = 60.0
# What updates are compared by while their clips are not known.
_ANY = -1


class Watchdog(Callback):
    """Warns of a slow update, and ends a process that waits in a phase of an update for longer than `timeout_s`.

    It names rank, update, phase, bucket and samples. Before the end it writes the stacks of all threads to
    `stuck-rank{N}.txt` in the run folder. Only updates are watched, not what callbacks do after them: saving, sampling
    and evaluating take what they take.
    To be the first callback, so that what the others do after an update is not part of it.
    """

    def __init__(self, run_folder: Path, place: Whereabouts, timer: PhaseTimer, timeout_s: float):
        self._place, self._timer, self._timeout_s = place, timer, timeout_s
        self._path = run_folder / f"stuck-rank{place.rank}.txt"
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._begin: float | None = None
        self._reported = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on_start(self, trainer) -> None:
        self._thread.start()

    def before_update(self, trainer) -> None:
        self._reported, self._begin = False, time.monotonic()

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        seconds, self._begin = time.monotonic() - self._begin, None
        for kind in (self._kind(), _ANY):
            self._seconds[kind].append(seconds)

    def on_end(self, trainer) -> None:
        self._begin = None

    def close(self) -> None:
        self._begin = None
        if self._thread.is_alive():
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = min(1.0, self._timeout_s / 10)
        while not self._closed.wait(pause):
            faulthandler.dump_traceback_later(self._timeout_s + _LATER_S, exit=True, file=sys.__stderr__)
            begin, now = self._begin, time.monotonic()
            if begin is None:
                continue
            if now - max(begin, self._timer.since) > self._timeout_s:
                self._end()
            elif not self._reported and now - begin > self._limit():
                self._reported = True
                get_logger().warning(
                    f"slow: {now - begin:.1f} s are over {_SLOW} times the median of such updates: {self._place}"
                )

    def _limit(self) -> float:
        """Seconds after which the update under way is slow."""
        known = self._seconds[self._kind()]
        if len(known) < _ENOUGH:
            return float("inf")
        return max(_LEAST_S, _SLOW * statistics.median(known))

    def _kind(self) -> int:
        """What updates are compared by: the frames of their first clips."""
        batches = self._place.micro_batches
        return batches[0].num_frames if batches else _ANY

    def _end(self) -> None:
        text = f"this process has waited for more than dist_timeout={self._timeout_s:g} s: {self._place}"
        with open(self._path, "a") as file:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"error: {text}; stacks of all threads: {self._path}", file=sys.stderr, flush=True)
        time.sleep(_OTHERS_S)
        os._exit(1)
