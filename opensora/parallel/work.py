"""Work that ranks take a piece at a time, and places where they wait for each other for as long as it takes.

Collectives give up after `dist_timeout`, which is right in training and wrong where ranks have unlike amounts of work.
So ranks count in the store that they met in. One that dies leaves the others waiting: its launcher ends them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from opensora.parallel.context import ParallelContext

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0


class SharedWork:
    """Hands out work among all ranks. Every rank makes one, and makes the same calls in the same order."""

    def __init__(self, context: ParallelContext):
        self._context = context
        name = context.broadcast_object(uuid4().hex)
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._calls = 0

    def numbers(self, count: int) -> Iterator[int]:
        """Numbers below `count` in rising order; each of them is given to the rank that asks next, and to no other."""
        self._calls += 1
        return self._take(f"numbers{self._calls}", count)

    def _take(self, name: str, count: int) -> Iterator[int]:
        while (number := self._store.add(name, 1) - 1) < count:
            yield number

    def wait(self) -> None:
        """Until every rank is here."""
        self._calls += 1
        name, pause = f"wait{self._calls}", _FIRST_PAUSE_S
        self._store.add(name, 1)
        while self._store.add(name, 0) < self._context.world_size:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """As `ParallelContext.on_main`, when every rank is here; the others wait while `work` runs."""
        self.wait()
        if self._context.is_main:
            work = _outcome(work)
        self.wait()
        return self._context.on_main(work)


def _outcome(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do `work`, for a function that gives what it gave, or raises what it raised of a user's mistake."""
    try:
        result = work()
    except (ValueError, OSError) as raised:
        error = raised

        def fail() -> Any:
            raise error

        return fail
    return lambda: result
