"""Pieces of logical tensors: which part of a parameter's full shape a rank holds, and where.

ZeRO keeps a contiguous range of each flattened parameter on a rank. A contiguous range of a row-major tensor is a few
axis-aligned rectangles of it, and each rectangle is contiguous in the range too. Written as rectangles of the full
shape, a checkpoint does not depend on the layout that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rectangle:
    """A box of a logical tensor, and the place of its first element in the flat range that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """The boxes that the elements [start, stop) of a row-major tensor of `shape` make up: at most 2 * ndim - 1.

    `position` counts from `start`.
    """
    yield from _rectangles(tuple(shape), start, stop, (), 0)


def _rectangles(shape, start, stop, prefix, position) -> Iterator[Rectangle]:
    if start >= stop:
        return
    leading = (1,) * len(prefix)
    if not shape:  # a scalar
        yield Rectangle(prefix, leading, position)
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if head:  # the range begins inside row `first`
        head_stop = min(row, stop - first * row)
        yield from _rectangles(shape[1:], head, head_stop, (*prefix, first), position)
        position += head_stop - head
        first += 1
    if last > first:  # whole rows
        offsets = (*prefix, first) + (0,) * (len(shape) - 1)
        yield Rectangle(offsets, (*leading, last - first, *shape[1:]), position)
        position += (last - first) * row
        first = last
    if tail and first == last:  # the range ends inside row `last`
        yield from _rectangles(shape[1:], 0, tail, (*prefix, last), position)


@dataclass(frozen=True)
class LogicalTensor:
    """The boxes of a tensor of `shape` that this rank holds; the views share memory with what they were made of."""

    shape: torch.Size
    dtype: torch.dtype
    boxes: list[tuple[Rectangle, torch.Tensor]]


@dataclass(frozen=True)
class ParameterShard:
    """The elements [start, stop) of the flattened parameter `name`, held by this rank.

    `master` is the rank's fp32 flat tensor; it may be longer than the range (padding at the end).
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    master: torch.Tensor

    def as_logical(self, flat: torch.Tensor) -> LogicalTensor:
        """`flat`, a tensor laid out as `master` (a moment, an average), as boxes of the parameter's full shape."""
        boxes = []
        for box in rectangles(tuple(self.shape), self.start, self.stop):
            count = math.prod(box.sizes)
            boxes.append((box, flat.view(-1)[box.position : box.position + count].view(box.sizes)))
        return LogicalTensor(self.shape, flat.dtype, boxes)
