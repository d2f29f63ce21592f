"""Reads clips in a process apart: where a decoder crashes, or memory runs out, that one ends and no other."""

from __future__ import annotations

import math
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from opensora.common import die_with_parent
from opensora.data.media import MediaError, one_line

# What the kernel may take to end a killed process. One that waits for a dead network disk it cannot end; of these so
# many may be left behind.
_SECONDS_TO_DIE, _LEFT_BEHIND = 5.0, 4
# Of the longest time: what a file may still take that took too long again and again. It may be well again.
_LEAST_SHARE = 1 / 64


class Quarantine:
    """Calls `function(path, ...)` -> Tensor in a process that is forked by the first call, and stays.

    A file on which the process dies is tried once more (what the kernel ends is not always to blame); if it dies again,
    the call raises MediaError; at once if it takes too long, since that has cost time enough. The next call starts
    another process. Not multiprocessing's: workers of a DataLoader may have no children of that kind. Where there is no
    fork, to be left out.

    Args:
        longest: seconds that a call may take; then its process is killed. Less for a file that took too long before,
            and see `begin_batch`.
    """

    def __init__(self, function: Callable[..., Tensor], longest: float):
        self.function, self.longest, self.pid = function, longest, 0
        self._patience = math.inf  # seconds
        self._share_of: dict[str, float] = {}  # of the longest time, for files that took too long
        self._left_behind: list[int] = []

    def begin_batch(self) -> None:
        """Until this is called again, calls that take too long cost 2 * `longest` seconds at most, all together: each
        halves what the next ones may take."""
        self._patience = self.longest

    def __call__(self, path: str, *arguments: Any) -> Tensor:
        """Whatever the function returns or raises."""
        own, end = self.longest * self._share_of.get(path, 1), ""
        limit = min(own, self._patience)
        for _ in range(2):
            if not self.pid:
                self._start(path)
            try:
                self.pipe.send((path, *arguments))
                if not self.pipe.poll(limit):
                    self._patience -= limit / 2
                    if limit == own:  # and not for the others' sake
                        self._share_of[path] = max(self._share_of.get(path, 1) / 2, _LEAST_SHARE)
                    raise MediaError(path, f"too slow: reading it takes longer than {limit:.3g} s")
                answer = self.pipe.recv()
                clip = None if isinstance(answer, Exception) else self._take(*answer)
            except (EOFError, OSError):
                end = self._end()
                continue
            except BaseException:
                self.close()  # or the answer would be taken for that of the next call
                raise
            self._share_of.pop(path, None)
            if clip is None:
                raise answer
            return clip
        raise MediaError(path, f"decoder crashed: reading the file ends the process ({end})")

    def _take(self, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
        self.memory.seek(0)
        array = np.fromfile(self.memory, dtype, int(np.prod(shape))).reshape(shape)
        self.memory.truncate(0)
        return torch.from_numpy(array)

    def _start(self, path: str) -> None:
        self._left_behind = [pid for pid in self._left_behind if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        if len(self._left_behind) > _LEFT_BEHIND:
            count = len(self._left_behind)
            raise MediaError(path, f"not tried: {count} killed processes wait for a disk that does not answer")
        self.memory = _shared_memory()
        self.pipe, theirs = Pipe()
        owner, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            self.pipe.close()
            _serve(theirs, self.memory, self.function, owner)
        theirs.close()  # so that the process's end is the pipe's

    def close(self) -> None:
        """End the process, if there is one."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._end()

    def _end(self) -> str:
        """Wait for the process's end, and say what it was."""
        pid, self.pid = self.pid, 0
        self.pipe.close()
        self.memory.close()
        until = time.monotonic() + _SECONDS_TO_DIE
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                self._left_behind.append(pid)
                return "it does not end"
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(ended[1])
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _shared_memory() -> Any:
    """An unbuffered file of no name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("clip"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _serve(pipe: Connection, memory: Any, function: Callable[..., Tensor], owner: int) -> NoReturn:
    """The process's life, until the pipe is closed. Nothing of what the owner does when it exits is done here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
        torch.set_num_threads(1)  # threads of the owner's are not in a fork: torch would wait for them for ever
        die_with_parent(owner)
        while os.getppid() == owner:
            pipe.send(_answer(memory, function, *pipe.recv()))
    finally:
        os._exit(1)


def _answer(memory: Any, function: Callable[..., Tensor], *arguments: Any) -> tuple | Exception:
    """(dtype, shape) of the array that was put into the memory, or what was raised."""
    try:
        array = function(*arguments).numpy()
        memory.seek(0)
        array.tofile(memory)
        return array.dtype, array.shape
    except Exception as error:
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:  # one that does not survive the way
            return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
