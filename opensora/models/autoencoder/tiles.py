"""Overlapping tiles of clips, and the linear blend that makes one clip of what became of them.

A tile begins three quarters of its size after the one before and is cut at the clip's end. Where two overlap, the
weight of the later one grows linearly from 0. A tile is blended with the one above it first, then with the one on its
left, each as its own blends have left it (Kong et al. 2024, HunyuanVideo).

A tile of time has one frame more: the first frame of whatever is coded becomes a latent by itself. A later tile's is
within the tile before, and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from opensora.models.autoencoder.items import Work

TIME, HEIGHT, WIDTH = 2, 3, 4  # dimensions of [B, C, T, H, W]

Grid = list[list[list[Tensor]]]  # tiles by time, row and column


@dataclass(frozen=True)
class TileSize:
    """side: a tile's height and width. frames: a tile's frames but the first. None: that is not cut.

    Multiples of 4.
    """

    side: int | None
    frames: int | None

    def compressed(self, spatial: int, temporal: int) -> TileSize:
        return TileSize(self.side and self.side // spatial, self.frames and self.frames // temporal)


def map_tiles(work: Work, clips: Tensor, size: TileSize, size_after: TileSize) -> Tensor:
    """What `work` makes of clips [B, C, T, H, W], tile by tile: [B, C', t, h, w].

    Args:
        work: gives each tile's result [1, C', ...]; it is overwritten.
        size: of the tiles. size_after: of a whole tile's result.
    """
    grids = [cut(clip, size) for clip in clips.split(1)]
    results = iter(work([tile for grid in grids for rows in grid for row in rows for tile in row]))
    return torch.cat([join(_like(grid, results), size_after) for grid in grids])


def cut(clip: Tensor, size: TileSize) -> Grid:
    """Views of [B, C, T, H, W]. Height and width are both cut where either is longer than a tile."""
    frames, height, width = clip.shape[2:]
    in_planes = size.side is not None and max(height, width) > size.side
    in_time = size.frames is not None and frames > size.frames
    rows, columns = (_spans(length, size.side, size.side) if in_planes else [slice(None)] for length in (height, width))
    times = _spans(frames, size.frames, size.frames + 1) if in_time else [slice(None)]
    return [[[clip[:, :, time, row, column] for column in columns] for row in rows] for time in times]


def _spans(length: int, size: int, taken: int) -> list[slice]:
    return [slice(start, start + taken) for start in range(0, length, size * 3 // 4)]


def _like(grid: Grid, results: Iterator[Tensor]) -> Grid:
    return [[[next(results) for _ in row] for row in rows] for rows in grid]


def join(grid: Grid, size: TileSize) -> Tensor:
    """One clip of its tiles, which are overwritten.

    Args:
        size: of a whole tile.
    """
    clips = [_join_plane(rows, size.side) for rows in grid]
    if len(clips) == 1:
        return clips[0]
    later = _join([clip[:, :, 1:] for clip in clips], TIME, size.frames)
    return torch.cat([clips[0][:, :, :1], later], TIME)


def _join_plane(rows: Sequence[Sequence[Tensor]], side: int | None) -> Tensor:
    lines = [_join(rows[0], WIDTH, side)]
    for above, row in pairwise(rows):
        for upper, tile in zip(above, row, strict=True):
            _fade(upper, tile, HEIGHT, side)
        lines.append(_join(row, WIDTH, side))
    return _put_together(lines, HEIGHT, side)


def _join(tiles: Sequence[Tensor], dim: int, size: int | None) -> Tensor:
    for before, tile in pairwise(tiles):
        _fade(before, tile, dim, size)
    return _put_together(tiles, dim, size)


def _put_together(tiles: Sequence[Tensor], dim: int, size: int | None) -> Tensor:
    """Each of them up to where the next one begins."""
    if len(tiles) == 1:
        return tiles[0]
    return torch.cat([*(tile.narrow(dim, 0, size * 3 // 4) for tile in tiles[:-1]), tiles[-1]], dim)


def _fade(before: Tensor, tile: Tensor, dim: int, size: int) -> None:
    """Blend the end of one tile into the beginning of the next, in place."""
    length = min(before.shape[dim], tile.shape[dim], size // 4)
    weight = torch.arange(length, dtype=torch.float64, device=tile.device) / length
    weight = weight.view(-1, *(1 for _ in tile.shape[dim + 1 :]))
    start = tile.narrow(dim, 0, length)
    end = before.narrow(dim, before.shape[dim] - length, length)
    start.copy_(_weighted(end, 1 - weight) + _weighted(start, weight))


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """x * weight in fp32 or better, in the dtype of x: what a product with a single number is."""
    return (x * weight.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
