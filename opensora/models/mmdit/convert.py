"""Weights between flux's layout (fused qkv, interleaved rotary) and Open-Sora's (split qkv, rotate-half rotary).

A tensor of one layout is made of row ranges of tensors of the other, with the rows of q and k permuted within each head
where the rotary forms differ: rows (2d, 2d+1) of flux are rows (d, D/2+d) of Open-Sora. Nothing is computed, so a
conversion is exact and a round trip gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a state dict holds q, k and v."""

    fused_qkv: bool  # one linear for q, k, v (and the single blocks' MLP), else one each
    interleaved: bool  # rotary planes (2d, 2d+1), else (d, D/2+d)


FLUX = Layout(fused_qkv=True, interleaved=True)
OPEN_SORA = Layout(fused_qkv=False, interleaved=False)

# A fused linear's name, and the split linears that its rows are. The last one takes the rows that are left.
_FUSED = {
    "_attn.qkv.": ("_attn.q_proj.", "_attn.k_proj.", "_attn.v_proj."),
    ".linear1.": (".q_proj.", ".k_proj.", ".v_mlp."),
}
_ROTATED = re.compile(r"\.(q_proj|k_proj)\.(weight|bias)$|\.(query|key)_norm\.scale$")
_HEAD = ".query_norm.scale"  # a tensor as long as a head


class Piece(NamedTuple):
    """Rows start..stop (to the end if None) of one tensor, `rotated` if they are entries of heads that rotary turns."""

    source: str
    start: int = 0
    stop: int | None = None
    rotated: bool = False


class Conversion(NamedTuple):
    """How to make each tensor of the target layout: its name -> the pieces of source tensors that it joins."""

    pieces: Mapping[str, list[Piece]]
    head_dim: int
    source: Layout
    target: Layout

    def tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Target tensor `name`; read: source tensors by name. What is not changed is not copied."""
        parts = [self._part(piece, read(piece.source)) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of target tensor `name`, by the shapes of the source tensors."""
        pieces = self.pieces[name]
        first = shapes[pieces[0].source]
        if pieces == [Piece(pieces[0].source)]:
            return first
        return (sum(len(range(shapes[p.source][0])[p.start : p.stop]) for p in pieces), *first[1:])

    def sources(self, name: str) -> list[str]:
        """The source tensors that target tensor `name` needs."""
        return list(dict.fromkeys(piece.source for piece in self.pieces[name]))

    def _part(self, piece: Piece, tensor: Tensor) -> Tensor:
        rows = tensor if (piece.start, piece.stop) == (0, None) else tensor[piece.start : piece.stop]
        if not piece.rotated or self.source.interleaved == self.target.interleaved:
            return rows
        planes = (-1, 2) if self.source.interleaved else (2, -1)
        heads = rows.unflatten(0, (-1, self.head_dim))  # [H, D, ...]
        return heads.unflatten(1, planes).transpose(1, 2).reshape(rows.shape)  # planes [D/2, 2] <-> [2, D/2]


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout that a file with these tensors has, by the published files: None if there is no block to tell by."""
    for name in names:
        if any(fused in name for fused in _FUSED):
            return FLUX
        if ".q_proj." in name:
            return OPEN_SORA
    return None


def plan_conversion(shapes: Mapping[str, tuple[int, ...]], source: Layout, target: Layout) -> Conversion:
    """How to make a state dict of layout `target` of one of layout `source` whose tensors have these shapes."""
    if source == target:
        return Conversion({name: [Piece(name)] for name in shapes}, 1, source, target)
    split: dict[str, Piece] = {}  # the tensors of a split layout, as pieces of the source
    for name in shapes:
        split.update(_split(name, shapes) if source.fused_qkv else {name: Piece(name)})
    split = {name: piece._replace(rotated=bool(_ROTATED.search(name))) for name, piece in split.items()}

    pieces = _fuse(split) if target.fused_qkv else {name: [piece] for name, piece in split.items()}
    head_dim = next((shape[0] for name, shape in shapes.items() if name.endswith(_HEAD)), 1)
    return Conversion(pieces, head_dim, source, target)


def convert(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """A state dict of layout `source` in layout `target`, e.g. `convert(flux_dev, FLUX, OPEN_SORA)`."""
    conversion = plan_conversion({name: tuple(tensor.shape) for name, tensor in state.items()}, source, target)
    return {name: conversion.tensor(name, state.__getitem__) for name in conversion.pieces}


def _split(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    weight = re.sub(r"bias$", "weight", name)
    for fused, (q, k, v) in _FUSED.items():
        if fused in name and weight in shapes:
            hidden = shapes[weight][1]  # q and k are as wide as their input
            return {
                name.replace(fused, q): Piece(name, 0, hidden),
                name.replace(fused, k): Piece(name, hidden, 2 * hidden),
                name.replace(fused, v): Piece(name, 2 * hidden),
            }
    return {name: Piece(name)}


def _fuse(split: Mapping[str, Piece]) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for name, piece in split.items():
        fused, names = _fused_name(name)
        whole = all(part in split for part in names)  # of an incomplete file, what there is keeps its name
        pieces[fused if whole else name] = [split[part] for part in names] if whole else [piece]
    return pieces


def _fused_name(name: str) -> tuple[str, list[str]]:
    """The fused tensor that a split one is part of, and all its parts in order; for others the name itself."""
    for fused, parts in _FUSED.items():
        for part in parts:
            if part in name:
                return name.replace(part, fused), [name.replace(part, other) for other in parts]
    return name, [name]
