"""Which windows of a video are cached, and reading them.

A run without a cache draws a new window of a video each epoch. A cache holds up to `windows` of them, spread over the
video: a run draws one of these each epoch. Where a video is no longer than the clip there is one, the same as without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from opensora.data.cache import entry_key
from opensora.data.cache_index import Key, file_mark
from opensora.data.frame_rate import map_target_fps, sampling_intervals
from opensora.data.random_draws import Purpose, hash_key, to_uniform
from opensora.data.records import Table
from opensora.data.video import window_positions

ClipSize = tuple[int, int, int]  # frames, height, width


class Window(NamedTuple):
    """A window of a file. `u`, in [0, 1), is where it begins, as `video.window_indices` takes it."""

    key: Key
    u: float


class ClipWindows:
    """The windows of a table's videos that are cached, at most `at_most` of a video."""

    def __init__(self, table: Table, fps_max: float | None, at_most: int):
        self.table, self.fps_max, self.at_most = table, fps_max, at_most

    def count(self, row: int, num_frames: int) -> int:
        total, interval = self._file(row)
        return min(self.at_most, window_positions(total, num_frames, interval))

    def count_all(self, rows: NDArray[np.integer], num_frames: int) -> int:
        """The sum of `count` over rows."""
        intervals = sampling_intervals(self.table.fps[rows], self.fps_max)
        covered = num_frames * intervals.astype(np.int64)
        positions = np.maximum(0, self.table.num_frames[rows] - covered - 1) + 1  # `window_positions`
        return int(np.minimum(self.at_most, positions).sum())

    def window(self, row: int, size: ClipSize, nth: int) -> Window:
        """One of `count` windows: it begins somewhere in the `nth` part of where windows can begin."""
        total, interval = self._file(row)
        count, positions = self.count(row, size[0]), window_positions(total, size[0], interval)
        key = entry_key("clip", self.table.listed_path(row), *self._file(row), *self._pixels(row), *size, nth, count)
        offset = float(to_uniform(hash_key(Purpose.WINDOW, key.high & (2**64 - 1))))
        first, end = nth * positions // count, (nth + 1) * positions // count
        begin = first + int(offset * (end - first))
        return Window(key, (begin + 0.5) / positions)

    def draw(self, row: int, size: ClipSize, u: float) -> Key:
        """The window that a sample's number `u` in [0, 1) chooses."""
        return self.window(row, size, int(u * self.count(row, size[0]))).key

    def _pixels(self, row: int) -> tuple[int, int]:
        return int(self.table.height[row]), int(self.table.width[row])

    def _file(self, row: int) -> tuple[int, int]:
        """(frames, interval between those of a clip)"""
        return int(self.table.num_frames[row]), map_target_fps(float(self.table.fps[row]), self.fps_max)[1]


class ClipRequest(NamedTuple):
    row: int
    size: ClipSize
    window: Window


class ClipBatch(NamedTuple):
    """Clips to encode. video: [B, 3, T, H, W], None if none could be read. rejected: (key, path, reason) of others.
    marks: `file_mark` of each clip's file, as it was before it was read."""

    keys: list[Key]
    marks: list[int]
    video: Tensor | None
    rejected: list[tuple[Key, str, str]]


class ClipSource(Protocol):
    """What `loader.VideoTextDataset` is."""

    table: Table
    read_clip: Callable[..., Tensor]
    read_timeout: float

    def clip(self, row: int, size: ClipSize, u: float) -> Tensor:
        """[3, T, H, W]"""


class ClipsToCache(Dataset):
    """Reads what a list of `ClipRequest` asks for, through the data set of a training run."""

    def __init__(self, source: ClipSource):
        self.source = source

    @property
    def read_clip(self) -> Callable[..., Tensor]:
        """What reads files, which workers replace (`loader`)."""
        return self.source.read_clip

    @read_clip.setter
    def read_clip(self, read: Callable[..., Tensor]) -> None:
        self.source.read_clip = read

    @property
    def read_timeout(self) -> float:
        return self.source.read_timeout

    def __getitems__(self, requests: Sequence[ClipRequest]) -> ClipBatch:
        keys, marks, clips, rejected = [], [], [], []
        for row, size, window in requests:
            mark = file_mark(self.source.table.path(row))
            try:
                clips.append(self.source.clip(row, size, window.u))
                keys.append(window.key)
                marks.append(mark)
            except Exception as error:  # whatever is wrong with one file must not end the work on a million
                reason = " ".join(str(error).split()) or type(error).__name__
                rejected.append((window.key, self.source.table.path(row), reason))
        return ClipBatch(keys, marks, torch.stack(clips) if clips else None, rejected)


def clip_requests(
    windows: ClipWindows, size: ClipSize, rows: np.ndarray, batch_size: int, is_done: Callable[[int, Key], bool]
) -> Iterator[list[ClipRequest]]:
    """Requests for all windows of `rows` in clips of one size, but those that are done, `batch_size` at a time.

    is_done: told a row and a window's key.
    """
    batch: list[Any] = []
    for row in rows.tolist():
        for nth in range(windows.count(row, size[0])):
            window = windows.window(row, size, nth)
            if is_done(row, window.key):
                continue
            batch.append(ClipRequest(row, size, window))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch
