"""The rate at which a video's frames are taken, so that no clip plays faster than `fps_max`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

LARGEST_INTERVAL = 2**31 - 1  # rates beyond all reason are found in tables


def map_target_fps(fps: float, fps_max: float | None) -> tuple[float, int]:
    """Frames per second of a clip, and the interval between the source frames it takes.

    Args:
        fps: of the file; NaN where it is unknown (images).
        fps_max: None sets no limit.

    Returns:
        (new fps, interval): an unknown rate gives (0, 1); a rate below the limit is kept as it is; otherwise every
        `ceil(fps / fps_max)`-th frame is taken, at most every LARGEST_INTERVAL-th, and the new rate is a whole number.
    """
    if math.isnan(fps):
        return 0, 1
    if fps_max is None or fps < fps_max:
        return fps, 1
    interval = math.ceil(min(fps / fps_max, LARGEST_INTERVAL))
    return math.floor(fps / interval), interval


def sampling_intervals(fps: NDArray[np.float64], fps_max: float | None) -> NDArray[np.int32]:
    """The intervals of `map_target_fps` for a column: [N]."""
    if fps_max is None:
        return np.ones(len(fps), dtype=np.int32)
    with np.errstate(invalid="ignore"):  # comparisons with NaN are false: an interval of 1
        intervals = np.ceil(np.minimum(fps / fps_max, LARGEST_INTERVAL))
        return np.where(fps >= fps_max, intervals, 1).astype(np.int32)
