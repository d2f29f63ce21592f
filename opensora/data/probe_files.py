"""Probes many files in processes that one bad file cannot stop, and shows how far it is."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from opensora.common import die_with_parent
from opensora.data.media import MediaError, one_line
from opensora.data.probe import VideoFacts, probe

SECONDS_BETWEEN_LINES = 10
# Paths handed to a worker at a time: few enough that all end together, enough that none waits for the next.
BATCH = 32
# Paths that may be read, for each worker, while the first of them is not yet: they and their results are in memory.
AHEAD = 8192
# What the kernel may take to end a killed process. One that waits for a dead network disk it cannot end; of these so
# many may be left behind for each worker.
_SECONDS_TO_DIE, _LEFT_BEHIND = 5.0, 4

Result = VideoFacts | str
FileProber = Callable[[Iterable["str | None"]], Iterator[Result]]


@contextmanager
def file_prober(
    folder: Path, num_workers: int, total: int, longest: float, verify: bool = False
) -> Iterator[FileProber]:
    """A function from paths to, in their order and as they come, the facts of each file or one line that says why it
    has none.

    Args:
        folder: where relative paths are looked up that are not found from the working directory.
        num_workers: processes; 0: none but this one.
        total: files in all calls together, for the progress.
        longest: seconds that a file may take a worker; this process waits for ever.
        verify: decode all pictures.
    """
    probe_one, progress = partial(_probe_one, folder=folder, verify=verify), Progress(total)
    pool = WorkerPool(probe_one, num_workers, longest) if num_workers else None

    def probe_all(paths: Iterable[str | None]) -> Iterator[Result]:
        for result in pool.map(paths) if pool else map(probe_one, paths):
            progress.add(1)
            yield result

    try:
        yield probe_all
    finally:
        if pool:
            pool.close()
        progress.close()


def _probe_one(path: str | None, folder: Path, verify: bool) -> Result:
    """The facts, or why there are none."""
    try:
        return probe(_locate(path, folder), verify) if path else "empty path"
    except MediaError as error:
        return error.reason
    except Exception as error:  # one strange file must not end a run of days
        return f"unexpected {type(error).__name__}: {one_line(error)}"


def _locate(path: str, folder: Path) -> str:
    """As in training (`records.Table.path`)."""
    beside = os.path.join(folder, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


class WorkerPool:
    """Processes that apply a function. One that dies (a decoder's crash, the kernel short of memory) is replaced; the
    item that it was at is tried once more, and then has a line that names the signal for its result. One that is at an
    item for longer than `longest` seconds is killed, and the item is not tried again.
    """

    def __init__(self, function: Callable[[str | None], Result], num_workers: int, longest: float):
        self.function, self.longest, self.context = function, longest, get_context("fork")
        self.workers = [_Worker(self.context, function) for _ in range(num_workers)]
        self.left_behind: list[BaseProcess] = []

    def map(self, items: Iterable[str | None]) -> Iterator[Result]:
        """The function's results, in the items' order; of the items, at most AHEAD for each worker are taken ahead.

        Raises:
            OSError: more processes than can be borne do not end though they are killed.
        """
        coming, again, results, suspects, given = _Numbered(items), deque(), {}, set(), 0
        while True:
            for worker in self.workers:
                if not worker.ahead:
                    room = given + AHEAD * len(self.workers) - coming.taken
                    worker.give(again.popleft() if again else coming.take(min(BATCH, room)))
            busy = [worker for worker in self.workers if worker.ahead]
            if not busy:
                return
            until = min(worker.since for worker in busy) + self.longest
            answered = connection.wait([worker.pipe for worker in busy], max(0.0, until - time.monotonic()))
            for worker in busy:
                try:
                    if worker.pipe in answered:
                        number, result = worker.take()
                        results[number] = result
                    elif time.monotonic() - worker.since > self.longest:
                        number, _ = worker.ahead.popleft()
                        results[number] = f"too slow: reading it takes longer than {self.longest:g} s"
                        worker.process.kill()
                        self._replace(worker, again)
                except (EOFError, OSError):
                    self._retry(worker, again, results, suspects)
            self._check_disk()
            while given in results:
                yield results.pop(given)
                given += 1

    def _retry(self, dead: _Worker, again: deque[list[_Item]], results: dict[int, Result], suspects: set[int]) -> None:
        """Replace a dead worker, and give its item out again if that is not known to kill."""
        item = dead.ahead.popleft()
        end = self._replace(dead, again)
        if item.number in suspects:
            results[item.number] = f"unreadable: reading it ends the process ({end})"
        else:
            suspects.add(item.number)
            again.appendleft([item])

    def _replace(self, dead: _Worker, again: deque[list[_Item]]) -> str:
        """Start another in a worker's place, give what it had not begun with out again, and say how it ended."""
        end = dead.end()
        if dead.ahead:
            again.append(list(dead.ahead))
        self.left_behind = [process for process in (*self.left_behind, dead.process) if process.exitcode is None]
        self.workers[self.workers.index(dead)] = _Worker(self.context, self.function)
        return end

    def _check_disk(self) -> None:
        if len(self.left_behind) > _LEFT_BEHIND * len(self.workers):
            raise OSError(
                f"{len(self.left_behind)} processes that were killed do not end: they wait for a disk that does not "
                "answer; when it does, the same command goes on from here"
            )

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.end()


class _Item(NamedTuple):
    number: int
    value: str | None


class _Numbered:
    """Items that are taken some at a time. `taken`: how many are."""

    def __init__(self, items: Iterable[str | None]):
        self.items, self.taken = iter(items), 0

    def take(self, count: int) -> list[_Item]:
        """The next `count` items, fewer at the end."""
        taken = [_Item(number, item) for number, item in enumerate(islice(self.items, max(0, count)), self.taken)]
        self.taken += len(taken)
        return taken


class _Worker:
    """A process and the pipe to it.

    Attributes:
        ahead: the items that it has been given and not answered.
        since: when it began with the first of these.
    """

    def __init__(self, context, function: Callable[[str | None], Result]):
        self.ahead: deque[_Item] = deque()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # so that the process's end is the pipe's

    def give(self, items: list[_Item]) -> None:
        if not items:
            return
        self.ahead.extend(items)
        self.since = time.monotonic()
        with suppress(OSError):  # it has died: reading its answer says so
            self.pipe.send([item.value for item in items])

    def take(self) -> tuple[int, Result]:
        """The number of the item that it was at, and the function's result. EOFError, OSError: it has died."""
        result = self.pipe.recv()
        self.since = time.monotonic()
        return self.ahead.popleft().number, result

    def end(self) -> str:
        """Wait for the process's end, and say what it was."""
        self.process.join(_SECONDS_TO_DIE)
        self.pipe.close()
        code = self.process.exitcode
        if code is None:
            return "it does not end"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(pipe: connection.Connection, function: Callable[[str | None], Result], owner: int) -> None:
    """A worker's life. Ctrl-C, which a terminal sends to all processes, is for the owner to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(owner)
    while True:
        for item in pipe.recv():
            pipe.send(function(item))


class Progress:
    """A bar on a terminal; elsewhere (a job's log) a line now and then."""

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done, self.stream = total, 0, stream or sys.stderr
        self.begin = self.last_line = time.monotonic()
        self.bar = (
            tqdm(total=total, unit=" files", file=self.stream, dynamic_ncols=True) if self.stream.isatty() else None
        )

    def add(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self._print_line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.last_line > self.begin:
            self._print_line()

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self.begin
        left = tqdm.format_interval(elapsed / max(1, self.done) * (self.total - self.done))
        rate = self.done / elapsed
        print(
            f"{self.done:,} of {self.total:,} files, {rate:,.0f} per second, {left} left", file=self.stream, flush=True
        )
