"""A buffer of host memory that tensors of a device wait in, copied beside the computation.

One side stream makes all copies, in order: so a place in the buffer may be given to the next tensor as soon as nobody
holds the one before, though its copy may not have ended. Device memory is given up only after the stream of the
computation waits for the copy; the allocator, which follows that stream, may then reuse it at once. (`record_stream`
would need neither, but leaves memory taken until the host sees the copy's end: far too late when it runs ahead.)
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from opensora.common import get_logger
from opensora.parallel.streams import side_stream

ALIGNMENT = 64  # bytes; places in the buffer begin at multiples
LEAVING = 2  # tensors that may be on their way to the host at a time, their device memory still taken


class HostBuffer:
    """`size` bytes of the host, allocated once, page-locked where the device copies from it by itself.

    Used by one thread at a time. Implements `models.offload.HostMemory`.

    Raises:
        ValueError: the host does not give that many bytes.
    """

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self.copies = side_stream(device)
        try:
            self._bytes = torch.empty(size, dtype=torch.uint8)
            self.copies.page_lock(self._bytes, owner=self)
        except RuntimeError as error:
            raise ValueError(
                f"grad_ckpt_buffer_size={size}: this host does not give each process {size / 2**30:.1f} GiB "
                "of page-locked memory: lower it, or set 0 to keep the tensors on the device"
            ) from error
        self._taken: dict[int, int] = {}  # first byte of a place -> first byte after it
        self._leaving: deque[weakref.ref[OffloadedTensor]] = deque()
        self._said_full = False

    @property
    def used(self) -> int:
        """Bytes in which tensors wait."""
        return sum(stop - start for start, stop in self._taken.items())

    def store(self, tensor: Tensor) -> OffloadedTensor | None:
        """Start to copy `tensor` to the host; None if there is no room. The first such is said in the log."""
        start = self._place(tensor.nbytes)
        if start is None:
            if not self._said_full:
                self._said_full = True
                get_logger().info(f"grad_ckpt_buffer_size={self.size} is full: what does not fit stays on the device")
            return None
        if len(self._leaving) == LEAVING:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                oldest.leave()
        stored = OffloadedTensor(self, start, tensor.detach())
        self._leaving.append(weakref.ref(stored))
        return stored

    def view(self, start: int, layout: Tensor) -> Tensor:
        """The tensor that begins at byte `start`, with shape, strides and dtype of `layout`."""
        memory = self._bytes[start : start + layout.nbytes].view(layout.dtype)
        return memory.as_strided(layout.shape, layout.stride())

    def free(self, start: int) -> None:
        del self._taken[start]

    def _place(self, size: int) -> int | None:
        """The first gap that is large enough."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        start = 0
        for taken, stop in sorted(self._taken.items()):
            if start + size <= taken:
                break
            start = stop
        if start + size > self.size:
            return None
        self._taken[start] = start + size
        return start


class OffloadedTensor:
    """A tensor in a HostBuffer, and while a copy from or to the device is under way, there too."""

    def __init__(self, buffer: HostBuffer, start: int, tensor: Tensor):
        self._buffer, self._start, self._device = buffer, start, tensor.device
        # preserves the strides of a dense tensor: kernels, and so the last bits of a result, may depend on them
        self._layout = torch.empty_like(tensor, device="meta")
        self._on_device: Tensor | None = tensor
        self._copied = buffer.copies.start(self._in_host(), tensor)
        self._leaves = True

    def leave(self) -> None:
        """Give up the device's memory, unless the tensor has been asked for since it was stored."""
        if self._leaves:
            self._let_go()

    def prefetch(self) -> None:
        self._leaves = False
        if self._on_device is None:
            self._on_device = torch.empty_like(self._layout, device=self._device)
            self._copied = self._buffer.copies.start(self._on_device, self._in_host())

    def take(self) -> Tensor:
        self.prefetch()
        return self._let_go()

    def _let_go(self) -> Tensor:
        tensor, self._on_device, self._leaves = self._on_device, None, False
        self._buffer.copies.wait(self._copied)
        return tensor

    def _in_host(self) -> Tensor:
        return self._buffer.view(self._start, self._layout)

    def __del__(self):
        if self._on_device is not None:
            self._let_go()
        self._buffer.free(self._start)
