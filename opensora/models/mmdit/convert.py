"""Weights from one layout to another (`layouts.py`).

A tensor of one layout is made of row ranges of tensors of the other, with the rows of q and k permuted within each head
where the rotary forms differ: rows (2d, 2d+1) of flux are rows (d, D/2+d) of Open-Sora. Nothing is computed, so a
conversion is exact and a round trip gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.models.mmdit.layouts import Layout, parts_of, tensor_with

_ROTATED = re.compile(r"\.(q_proj|k_proj)\.(weight|bias)$|\.(query|key)_norm\.scale$")
_HEAD = ".query_norm.scale"  # a part as long as a head


class Piece(NamedTuple):
    """Rows start..stop (to the end if None) of one tensor, `rotated` if rotary turns them in planes of another form."""

    source: str
    start: int = 0
    stop: int | None = None
    rotated: bool = False


class Conversion(NamedTuple):
    """How to make each tensor of the target layout: its name -> the pieces of source tensors that it joins."""

    pieces: Mapping[str, list[Piece]]
    head_dim: int
    to_interleaved: bool  # the form that rotated pieces get

    def tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Target tensor `name`; read: source tensors by name. What is not changed is not copied."""
        parts = [self._part(piece, read(piece.source)) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of target tensor `name`, by the shapes of the source tensors."""
        pieces = self.pieces[name]
        first = shapes[pieces[0].source]
        if len(pieces) == 1 and _is_whole(pieces[0]):
            return first
        return (sum(len(range(shapes[p.source][0])[p.start : p.stop]) for p in pieces), *first[1:])

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of all target tensors."""
        return {name: self.shape(name, shapes) for name in self.pieces}

    def sources(self, names: Iterable[str]) -> list[str]:
        """The source tensors that target tensors need."""
        return list(dict.fromkeys(piece.source for name in names for piece in self.pieces[name]))

    def _part(self, piece: Piece, tensor: Tensor) -> Tensor:
        rows = tensor if _is_whole(piece) else tensor[piece.start : piece.stop]
        if not piece.rotated:
            return rows
        planes = (2, -1) if self.to_interleaved else (-1, 2)
        heads = rows.unflatten(0, (-1, self.head_dim))  # [H, D, ...]
        return heads.unflatten(1, planes).transpose(1, 2).reshape(rows.shape)  # planes [D/2, 2] <-> [2, D/2]


def plan_conversion(shapes: Mapping[str, tuple[int, ...]], source: Layout, target: Layout) -> Conversion:
    """How to make a state dict of layout `target` of one of layout `source` whose tensors have these shapes.

    Of a file that lacks parts of a tensor, the others keep their own names.
    """
    if source == target:
        return Conversion({name: [Piece(name)] for name in shapes}, 1, target.interleaved)
    parts: dict[str, Piece] = {}
    for name in shapes:
        parts.update(_cut(name, shapes, source.naming))
    head_dim = next((math.prod(shapes[piece.source]) for part, piece in parts.items() if part.endswith(_HEAD)), 1)
    if source.interleaved != target.interleaved:
        parts = {part: piece._replace(rotated=bool(_ROTATED.search(part))) for part, piece in parts.items()}
    return Conversion(_join(parts, target.naming), head_dim, target.interleaved)


def convert(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """A state dict of layout `source` in layout `target`, e.g. `convert(flux_dev, FLUX, OPEN_SORA)`."""
    conversion = plan_conversion({name: tuple(tensor.shape) for name, tensor in state.items()}, source, target)
    return {name: conversion.tensor(name, state.__getitem__) for name in conversion.pieces}


def _cut(name: str, shapes: Mapping[str, tuple[int, ...]], naming: str) -> dict[str, Piece]:
    """The parts of a tensor: all but the last have as many rows as the linear has inputs, the last what is left."""
    parts = parts_of(name, naming)
    if len(parts) == 1:
        return {parts[0]: Piece(name)}
    weight = shapes.get(re.sub(r"bias$", "weight", name), ())
    if len(weight) != 2:
        return {name: Piece(name)}  # there is no telling where to cut
    starts = [index * weight[1] for index in range(len(parts))]
    return {part: Piece(name, *rows) for part, *rows in zip(parts, starts, [*starts[1:], None], strict=True)}


def _join(parts: Mapping[str, Piece], naming: str) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for part, piece in parts.items():
        tensor = tensor_with(part, naming)
        needed = parts_of(tensor, naming)
        if all(other in parts for other in needed):
            pieces[tensor] = _merge([parts[other] for other in needed])
        else:
            pieces[part] = [piece]
    return pieces


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Pieces that follow each other in one tensor as one: then nothing need be copied."""
    merged = [pieces[0]]
    for piece in pieces[1:]:
        last = merged[-1]
        if (last.source, last.stop, last.rotated) == (piece.source, piece.start, piece.rotated):
            merged[-1] = last._replace(stop=piece.stop)
        else:
            merged.append(piece)
    return merged


def _is_whole(piece: Piece) -> bool:
    return (piece.start, piece.stop) == (0, None)
