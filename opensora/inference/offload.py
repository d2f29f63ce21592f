"""Models that wait in host memory and are on the device only while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


class Offloaded:
    """A frozen module that was built on the host; `with offloaded():` its weights are on `device`.

    The host keeps its copy: leaving the device copies nothing.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._device = device
        self._kept = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.inference_mode(False):  # weights are no tensors of inference mode, whatever mode the caller is in
            for tensor, host in self._kept:
                tensor.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for tensor, host in self._kept:
                tensor.data = host
            torch.cuda.empty_cache()  # so that what comes next finds memory in one piece; nothing without CUDA


def residence(module: nn.Module, device: torch.device, offload: bool) -> Callable[[], AbstractContextManager]:
    """What to enter while `module` computes: nothing where it lives on `device` anyway."""
    moves = offload and device.type != "cpu"
    return Offloaded(module, device) if moves else nullcontext


def called_at_work(module: nn.Module, device: torch.device, offload: bool) -> Callable[..., Any]:
    """`module` as a function: on `device` while it is called."""
    at_work = residence(module, device, offload)

    def call(*args: Any) -> Any:
        with at_work():
            return module(*args)

    return call
