"""Probes many files with pandarallel's processes, and shows how far it is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from opensora.data.media import MediaError, one_line
from opensora.data.probe import VideoFacts, probe

SECONDS_BETWEEN_LINES = 10
# What workers write to the pipe: a byte for each file, and one when there are no more.
DONE, END = b".", b"\n"


FileProber = Callable[[Sequence["str | None"]], "list[VideoFacts | str]"]


@contextmanager
def file_prober(folder: Path, num_workers: int, total: int) -> Iterator[FileProber]:
    """A function from paths to the facts of each file, or to one line that says why it has none.

    Args:
        folder: where relative paths are looked up that are not found from the working directory.
        num_workers: processes; 0: none but this one.
        total: files in all calls together, for the progress.
    """
    if num_workers:
        from pandarallel import pandarallel

        pandarallel.initialize(nb_workers=num_workers, verbose=0, use_memory_fs=False)
    progress = Progress(total)
    probe_all = _probe_in_workers if num_workers else _probe_here
    with _interrupt_reaches_only_this_process():
        try:
            yield partial(probe_all, folder=folder, progress=progress)
        finally:
            progress.close()


def end_children_with_this_process() -> None:
    """From now on Linux kills processes forked here when this one ends, whatever ends it: for a program's main.

    Among them is a server that pandarallel starts, which would stay for ever.
    """

    def end_with_parent() -> None:
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        os.register_at_fork(after_in_child=end_with_parent)


def _probe_here(paths: Sequence[str | None], folder: Path, progress: Progress) -> list[VideoFacts | str]:
    return [_probe_and_tell(path, folder, progress.add) for path in paths]


def _probe_in_workers(paths: Sequence[str | None], folder: Path, progress: Progress) -> list[VideoFacts | str]:
    import pandas as pd

    with _told_by_workers(progress) as pipe:
        probe_one = partial(_probe_and_tell, folder=folder, tell=partial(_tell, pipe))
        return pd.Series(paths, dtype=object).parallel_apply(probe_one).tolist()


def _probe_and_tell(path: str | None, folder: Path, tell: Callable[[int], None]) -> VideoFacts | str:
    """The facts, or why there are none; then `tell(1)`."""
    try:
        return probe(_locate(path, folder)) if path else "empty path"
    except MediaError as error:
        return error.reason
    except Exception as error:  # one strange file must not end a run of days
        return f"unexpected {type(error).__name__}: {one_line(error)}"
    finally:
        tell(1)


def _locate(path: str, folder: Path) -> str:
    """As in training (`records.Table.path`)."""
    beside = os.path.join(folder, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


@contextmanager
def _told_by_workers(progress: Progress) -> Iterator[int]:
    """A pipe's end that forked processes inherit: a byte written there is a file done."""
    read_end, write_end = os.pipe()

    def relay() -> None:
        while (told := os.read(read_end, 1 << 16)).count(END) == 0:
            progress.add(len(told))
        progress.add(len(told) - 1)

    relaying = threading.Thread(target=relay, daemon=True)
    relaying.start()
    try:
        yield write_end
    finally:
        os.write(write_end, END)
        relaying.join()
        os.close(read_end)
        os.close(write_end)


@contextmanager
def _interrupt_reaches_only_this_process() -> Iterator[None]:
    """Ctrl-C is sent to all processes of a terminal. This one answers; workers, which inherit the handler, go on, and
    end as this one does. (SIGTERM must keep its default: it is how pools end their workers, and a handler may miss it.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def answer(_signum: int, _frame: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(pipe: int, count: int) -> None:
    os.write(pipe, DONE * count)


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
