"""A second stream of a device, on which data is copied beside the computation; nothing of it for a device without."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor


def side_stream(device: torch.device) -> SideStream | NoStream:
    return SideStream(device) if device.type == "cuda" else NoStream()


class SideStream:
    """Copies of a CUDA device on a stream of their own."""

    page_locks = True

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def on_device(self) -> AbstractContextManager:
        """For a thread: a new one's current device is the first of the machine, whatever this process computes on."""
        return torch.cuda.device(self._device)

    def page_lock(self, memory: Tensor, owner: object) -> None:
        """As it is, while `owner` is there: torch's own page-locked allocations are rounded up to a power of two.

        Raises:
            RuntimeError: the host does not give so much of such memory.
        """
        with self.on_device():
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            with suppress(RuntimeError):  # the next launch on this thread is told of the error, which is over with that
                torch.zeros(1, device=self._device)
            raise RuntimeError(f"cudaHostRegister returned error {code}")
        weakref.finalize(owner, self._unlock, memory.data_ptr()).atexit = False

    def _unlock(self, address: int) -> None:
        self._stream.synchronize()
        with self.on_device():
            torch.cuda.cudart().cudaHostUnregister(address)

    def follow(self) -> None:
        """Let the copies to come wait for what the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy after what the current stream has been given so far; returns the copy's end."""
        self.follow()
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def upload(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """(`source` on the device, the copy's end). The tensor's memory is this stream's: when it is given up, the
        stream must `follow` its last user before it copies again."""
        with torch.cuda.stream(self._stream):
            return source.to(self._device, non_blocking=True), self._stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        """Let the current stream, not the host, wait."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def wait_on_host(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()

    def wait_for_current(self) -> None:
        """Let the host wait for what the current stream has been given so far."""
        torch.cuda.current_stream(self._device).synchronize()


class NoStream:
    """Copies of a device that has no streams: made at once."""

    page_locks = False

    def on_device(self) -> AbstractContextManager:
        return nullcontext()

    def page_lock(self, memory: Tensor, owner: object) -> None:
        """The device reads any memory."""

    def follow(self) -> None:
        """There is nothing to wait for."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)

    def upload(self, source: Tensor) -> tuple[Tensor, Any]:
        return source, None

    def wait(self, copied: Any) -> None:
        """It was made at once."""

    def wait_on_host(self, copied: Any) -> None:
        """It was made at once."""

    def wait_for_current(self) -> None:
        """What the device was given is done."""
