"""Small leaves that every layer may use: dtypes, rank facts, logging."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "half": torch.float16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def to_torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype='{name}' is unknown: one of {', '.join(DTYPES)}")
    return DTYPES[name]


def rank() -> int:
    """The global rank that the launcher gave this process (0 without a launcher)."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def get_logger() -> logging.Logger:
    """The project's logger; silent below warnings on ranks other than 0."""
    logger = logging.getLogger("opensora")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        # says, whoever imports it, which kernels it could use that are not needed here
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return logger


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent `parent` ends, whatever ends that; at once if it has ended."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def log_to_file(path: str | Path) -> logging.Handler:
    """Append the logger's lines to a file too, until the handler that is returned is removed."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s"))
    get_logger().addHandler(handler)
    return handler


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report a user's mistake as one line on stderr and end with exit code 1.

    A mistake is a ValueError or OSError that this project raised itself; anything else keeps its traceback. Rank 0
    speaks at once. The other ranks wait: a launcher ends the job when its first process ends, and what they have to
    say is mostly the same.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).parent):
            raise
        sys.stdout.flush()
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(30)  # on a busy machine ranks start, and end, seconds apart
            print(f"error: rank {rank()}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
