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

from opensora.parallel.split import Split


@dataclass(frozen=True)
class Rectangle:
    """A box of a logical tensor, and the place in the flat range that holds it where it, or what it was cut from,
    begins."""

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
    """The elements [start, stop) of this rank's flattened part of the parameter `name`.

    Attributes:
        shape: of the whole parameter.
        split: which part of it tensor parallelism gives this rank; None: all.
        master: the rank's fp32 flat tensor; it may be longer than the range (padding at the end).
        owned: False where another rank holds the same elements, and writes them.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    master: torch.Tensor
    split: Split | None = None
    owned: bool = True

    def as_logical(self, flat: torch.Tensor) -> LogicalTensor:
        """`flat`, a tensor laid out as `master` (a moment, an average), as boxes of the parameter's whole shape."""
        boxes = []
        part = self.shape if self.split is None else self.split.part_shape(self.shape)
        for box in rectangles(tuple(part), self.start, self.stop):
            count = math.prod(box.sizes)
            view = flat.view(-1)[box.position : box.position + count].view(box.sizes)
            boxes += [(box, view)] if self.split is None else _in_whole(box, view, self.split)
        return LogicalTensor(self.shape, flat.dtype, boxes)


def _in_whole(box: Rectangle, view: torch.Tensor, split: Split) -> Iterator[tuple[Rectangle, torch.Tensor]]:
    """A box of a rank's part as boxes of the whole parameter: one for each segment that it reaches into."""
    dim, first = split.dim, box.offsets[split.dim]
    for inside, outside, length in split.ranges():
        start, stop = max(first, inside), min(first + box.sizes[dim], inside + length)
        if start < stop:
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim], sizes[dim] = outside + start - inside, stop - start
            yield Rectangle(tuple(offsets), tuple(sizes), box.position), view.narrow(dim, start - first, stop - start)
