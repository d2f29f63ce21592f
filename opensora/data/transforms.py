"""Geometry of a clip at its bucket's size, and the scale of its values."""

from __future__ import annotations

import torch
from torch import Tensor


def cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same shape that covers the target: one side equals it, to a rounded pixel."""
    by_height, by_width = target_height / height, target_width / width
    if by_height > by_width:
        return target_height, max(target_width, round(width * by_height))
    return max(target_height, round(height * by_width)), target_width


def centre_crop(height: int, width: int, target_height: int, target_width: int) -> tuple[slice, slice]:
    """The rows and columns of a target-sized box in the middle; an odd margin leaves its last pixel below, right."""
    top, left = (height - target_height) // 2, (width - target_width) // 2
    return slice(top, top + target_height), slice(left, left + target_width)


def normalise(video: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 of any shape -> [-1, 1] in `dtype`, computed in fp32. Floating input is normalised already: cast only."""
    if video.is_floating_point():
        return video.to(dtype)
    return video.float().div_(255).sub_(0.5).div_(0.5).to(dtype)
