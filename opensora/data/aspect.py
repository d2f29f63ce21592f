"""Image sizes of a resolution by aspect ratio.

Ratios are named width:height, as people do ("16:9"), while sizes are (height, width) and a ratio's number is h/w. Both
tables follow Open-Sora 2.0, whose weights were trained and are sampled at these sizes (spec 7).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Landscape and square names; each also stands for its transpose.
RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")

SizeTable = dict[str, tuple[int, int]]


def ratio_value(name: str) -> float:
    """ "16:9" -> 9 / 16: height over width."""
    width, height = map(float, name.split(":"))
    return height / width


def transposed(name: str) -> str:
    """ "16:9" -> "9:16"."""
    width, height = name.split(":")
    return f"{height}:{width}"


def resolution_area(name: str) -> int:
    """Pixels of a resolution: "256px" is 256 * 256, "720p" a 16:9 frame of that height; a suffix is ignored.

    Raises:
        ValueError: for another form of name.
    """
    base = str(name).partition("_")[0]
    digits, unit = base.rstrip("px"), base[len(base.rstrip("px")) :]
    if not digits.isdecimal() or int(digits) == 0 or unit not in ("p", "px"):
        raise ValueError(f"resolution '{name}' is unknown: use '256px' (256 x 256 pixels) or '720p' (a 16:9 frame)")
    side = int(digits)
    return side * side if unit == "px" else side * side * 16 // 9


def size_table(area: int, multiple: int, training: bool = True) -> SizeTable:
    """(height, width) by ratio name for a pixel budget.

    Args:
        area: pixels.
        multiple: of the autoencoder's spatial compression and the patch: sizes are multiples of it.
        training: one step towards the budget is allowed and ratios that end at the same size are merged. The
            tables of sampling do neither.
    """
    landscape: SizeTable = {}
    portrait: SizeTable = {}
    for name in RATIOS:
        width = math.floor(math.sqrt(area * ratio_value(transposed(name))) / multiple) * multiple
        height = math.floor(area / max(width, 1) / multiple) * multiple
        if min(height, width) < multiple:
            continue  # too elongated for so few pixels
        if training:
            height, width = _nearest_to_budget(height, width, area, multiple)
        if training and (height, width) in landscape.values():
            continue
        landscape[name] = (height, width)
        portrait[transposed(name)] = (width, height)
    return landscape | portrait


def _nearest_to_budget(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """The size, or one with a side a multiple longer or shorter, whose area is nearest; the first of equals."""
    sizes = [(height, width)]
    sizes += [(height + step, width) for step in (-multiple, multiple)]
    sizes += [(height, width + step) for step in (-multiple, multiple)]
    return min((size for size in sizes if min(size) > 0), key=lambda size: abs(size[0] * size[1] - area))


def resolution_sizes(name: str, multiple: int, training: bool = True) -> SizeTable:
    """The size table of a resolution name, e.g. "256px"; "256px_max" keeps the largest size only, "256px_ar16:9" one.

    Raises:
        ValueError: for an unknown name, suffix or ratio, or if no size of this resolution is a multiple.
    """
    table = size_table(resolution_area(name), multiple, training)
    if not table:
        raise ValueError(f"resolution '{name}' is too small: sizes are multiples of {multiple} pixels")
    suffix = name.partition("_")[2]
    if not suffix:
        return table
    if suffix == "max":
        ratio = max(table, key=lambda key: table[key][0] * table[key][1])
    elif suffix.startswith("ar") and suffix[2:] in table:
        ratio = suffix[2:]
    else:
        raise ValueError(f"resolution '{name}': the suffix is '_max' or '_ar' and one of {', '.join(table)}")
    return {ratio: table[ratio]}


def image_size(resolution: str, ratio: str, multiple: int, training: bool = False) -> tuple[int, int]:
    """(height, width) of a ratio, by default as sampling has it.

    Raises:
        ValueError: for an unknown resolution or ratio.
    """
    table = resolution_sizes(resolution, multiple, training)
    if ratio not in table:
        raise ValueError(f"aspect_ratio='{ratio}' is unknown: one of {', '.join(table)}")
    return table[ratio]


def closest_ratios(height: NDArray, width: NDArray, names: list[str]) -> NDArray[np.int64]:
    """For each size, the position in `names` of the ratio whose h/w differs least; the first of equals. [N]."""
    ratios = height / width  # [N]
    best = np.zeros(len(ratios), dtype=np.int64)
    distance = np.abs(ratios - ratio_value(names[0]))
    for i, name in enumerate(names[1:], start=1):
        candidate = np.abs(ratios - ratio_value(name))
        closer = candidate < distance
        best[closer] = i
        distance = np.where(closer, candidate, distance)
    return best


def closest_ratio(height: int, width: int, names: list[str]) -> str:
    """The one of `names` whose h/w differs least from a size's."""
    return names[int(closest_ratios(np.array([height]), np.array([width]), names)[0])]
