"""Inputs of recomputed blocks that wait for the backward pass in host memory.

A recomputed block keeps its inputs: one hidden state a token (two tensors for a double block). Where they wait and how
they are copied is the host memory's (`parallel/offload.py`); here is which tensors, and when they have to be back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class HostCopy(Protocol):
    """A tensor that waits in host memory; its place is free again when this object is gone."""

    def prefetch(self) -> None:
        """Start to copy it back, if that has not been started."""

    def take(self) -> Tensor:
        """The tensor on its device; the caller alone holds it."""


class HostMemory(Protocol):
    def store(self, tensor: Tensor) -> HostCopy | None:
        """Start to copy a tensor to the host; None: there is no room, it has to stay where it is."""


def offload_inputs(blocks: Sequence[nn.Module], memory: HostMemory) -> None:
    """Let the hidden states that recomputed blocks keep for the backward pass wait in `memory`.

    A block's backward pass takes back its own and starts to copy those of the block before. Values don't change. What
    all blocks share, the conditioning vector and the rotary table, stays. `checkpoint_blocks` undoes it.

    Args:
        blocks: of `checkpoint_blocks`, in the order of the forward pass. If they are compiled too, compile first: this
            wraps `block.forward` in hooks of autograd, which have to stay outside of a compiled graph.
    """
    passes = _Passes(memory)
    for block in blocks:
        block.forward = partial(_offloaded, block.forward, passes, block is blocks[0])


def _offloaded(forward: Callable, passes: _Passes, is_first: bool, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    pack = partial(_pack, passes.memory, passes.enter_block(is_first), {_address(t) for t in args if _is_hidden(t)})
    with saved_tensors_hooks(pack, _unpack):
        return forward(*args)


def _is_hidden(argument: Any) -> bool:
    """[B, L, hidden] is a hidden state; the conditioning vector is [B, hidden], the rotary table no tensor."""
    return isinstance(argument, Tensor) and argument.dim() == 3 and argument.numel() > 0


def _address(tensor: Tensor) -> tuple:
    """What is equal for two tensors only if they are the same elements: compiled code saves others than it is given."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Passes:
    """The order of blocks within one forward pass."""

    def __init__(self, memory: HostMemory):
        self.memory = memory
        self._newest: Callable[[], _BlockInputs | None] = _nothing

    def __deepcopy__(self, memo: dict) -> _Passes:
        return _Passes(self.memory)  # a copy of the model shares the memory

    def enter_block(self, is_first: bool) -> _BlockInputs:
        inputs = _BlockInputs(_nothing if is_first else self._newest)
        self._newest = weakref.ref(inputs)
        return inputs


def _nothing() -> None:
    return None


class _BlockInputs:
    """What one block of one forward pass has in host memory; `previous` gives the block's before, if still there."""

    def __init__(self, previous: Callable[[], _BlockInputs | None]):
        self.copies: list[HostCopy] = []
        self._previous = previous

    def take(self, copy: HostCopy) -> Tensor:
        tensor = copy.take()
        previous = self._previous()
        if previous is not None:
            for earlier in previous.copies:
                earlier.prefetch()
        return tensor


def _pack(memory: HostMemory, inputs: _BlockInputs, hidden: set[tuple], tensor: Tensor) -> Any:
    copy = memory.store(tensor) if _address(tensor) in hidden else None
    if copy is None:
        return tensor
    inputs.copies.append(copy)
    return inputs, copy


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    inputs, copy = packed
    return inputs.take(copy)
