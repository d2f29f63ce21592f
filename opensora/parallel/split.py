"""How tensor parallelism divides one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How a parameter is divided: along `dim`, each of its segments in `size` equal parts; a rank has one of each.

    Attributes:
        segments: lengths of the whole parameter's segments along `dim`.
    """

    dim: int
    segments: tuple[int, ...]
    rank: int
    size: int

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(place in the rank's part, place in the whole, length) along `dim`, for each segment."""
        inside = outside = 0
        for segment in self.segments:
            length = segment // self.size
            yield inside, outside + self.rank * length, length
            inside, outside = inside + length, outside + segment

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter, in memory of its own."""
        return torch.cat([whole.narrow(self.dim, start, length) for _, start, length in self.ranges()], self.dim)

    def part_shape(self, whole: torch.Size) -> torch.Size:
        """A part's shape, of a parameter whose whole has the shape `whole`."""
        return torch.Size((*whole[: self.dim], whole[self.dim] // self.size, *whole[self.dim + 1 :]))

    def whole_shape(self, part: torch.Size) -> torch.Size:
        """The whole parameter's shape, of which a rank's part has the shape `part`."""
        return torch.Size((*part[: self.dim], sum(self.segments), *part[self.dim + 1 :]))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from all ranks' parts, in their order."""
        lengths = [segment // self.size for segment in self.segments]
        pieces = [part.split(lengths, self.dim) for part in parts]
        return torch.cat([piece[i] for i in range(len(lengths)) for piece in pieces], self.dim)
