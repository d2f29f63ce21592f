"""Reads clips in a process apart: where a decoder crashes, or memory runs out, that one ends and no other."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from opensora.data.media import MediaError, one_line


class Quarantine:
    """Calls `function(path, ...)` -> Tensor in a process that is forked by the first call, and stays.

    A file on which the process dies is tried once more (what the kernel ends is not always to blame); if it dies again,
    the call raises MediaError. The next call starts another process. Not multiprocessing's: workers of a DataLoader may
    have no children of that kind. Where there is no fork, to be left out.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.pid = function, 0

    def __call__(self, path: str, *arguments: Any) -> Tensor:
        """Whatever the function returns or raises."""
        end = ""
        for _ in range(2):
            if not self.pid:
                self._start()
            try:
                self.pipe.send((path, *arguments))
                answer = self.pipe.recv()
                clip = None if isinstance(answer, Exception) else self._take(*answer)
            except (EOFError, OSError):
                end = self._end()
                continue
            except BaseException:
                self.close()  # or the answer would be taken for that of the next call
                raise
            if clip is None:
                raise answer
            return clip
        raise MediaError(path, f"decoder crashed: reading the file ends the process ({end})")

    def _take(self, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
        self.memory.seek(0)
        array = np.fromfile(self.memory, dtype, int(np.prod(shape))).reshape(shape)
        self.memory.truncate(0)
        return torch.from_numpy(array)

    def _start(self) -> None:
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
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        self.pipe.close()
        self.memory.close()
        code = os.waitstatus_to_exitcode(status)
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
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
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
