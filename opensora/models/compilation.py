"""torch.compile for the blocks of the MMDiT: nearly all of the computation, in a few small graphs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.common import get_logger
from opensora.models.mmdit import MMDiT
from opensora.models.mmdit.rotary import RotaryTable


def compile_blocks(model: MMDiT, backend: str | Callable = "inductor") -> None:
    """Compile what every block runs; parameters keep their names, results their values but for rounding.

    The blocks of a kind share their graphs, whatever the depth. Batch size and lengths are dynamic, so the number of
    graphs does not grow with that of buckets: for each kind torch makes one for a batch of 1 and one for larger ones,
    and another where its code for few tokens differs from that for many.

    Nothing is compiled before a block is first called. Recomputation (`activation.py`) comes before this call: what it
    keeps is decided within the graph then, by its policy "attention" too, which watches operators and would not see
    those of a graph that was compiled before. Offloading (`offload.py`) comes after: its hooks have to stay outside.

    backend: of torch.compile.
    """
    get_logger().info("model.compile=True: the blocks are compiled as they first run, which takes minutes")
    for blocks, run in ((model.double_blocks, _run_double), (model.single_blocks, _run_single)):
        compiled = torch.compile(run, dynamic=True, backend=backend)
        for block in blocks:
            # on the instance: wrapping the module would put a name before its parameters'
            block.forward = partial(compiled, block.forward)
    for block in model.double_blocks[:1]:
        block.register_forward_pre_hook(_copy_views)


def _copy_views(block: nn.Module, arguments: tuple) -> tuple:
    """What the first block is given are views, of what a linear layer computes; what the others are given never is.
    torch makes graphs of their own for views: one copy of the hidden states in a forward pass saves compiling twice."""
    return tuple(a.clone() if isinstance(a, Tensor) and a._is_view() else a for a in arguments)


# torch keeps graphs by the function that it enters. A function for each kind of block gives each its own few, and
# `forward` as an argument makes one graph fit all blocks: their weights are inputs too.


def _run_double(forward: Callable, img: Tensor, txt: Tensor, vec: Tensor, table: RotaryTable) -> Any:
    return forward(img, txt, vec, table)


def _run_single(forward: Callable, x: Tensor, vec: Tensor, table: RotaryTable) -> Any:
    return forward(x, vec, table)


def why_not_compile(has_cuda: bool) -> str | None:
    """What torch.compile lacks on this machine; None if nothing. has_cuda: whether the model runs on a CUDA device.

    torch's own message for each of these is a hundred lines, after the model is loaded and the first batch encoded.
    """
    if has_cuda and importlib.util.find_spec("triton") is None:
        return "the package triton for CUDA devices: pip install triton"
    compiler = _c_compiler() if has_cuda else _cpp_compiler()
    if shutil.which(compiler) is None:
        variable = "CC" if has_cuda else "CXX"
        return f"a compiler, and there is no '{compiler}' on the PATH: apt-get install g++, or set {variable} to yours"
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if not header.is_file():
        return f"Python's headers, and there is no {header}: apt-get install python3-dev"
    return None


def _cpp_compiler() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def _c_compiler() -> str:
    """What triton builds its launchers with."""
    return os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
