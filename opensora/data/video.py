"""Clips: chosen frames of a video or image file, at the bucket's size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.data.container_layout import is_image
from opensora.data.frames import read_frames
from opensora.data.media import MediaError, Orientation, open_image, orientation, require_file, to_rgb
from opensora.data.remote import locate
from opensora.data.transforms import centre_crop, cover_size, normalise

RESIZE_MODES = ("fast", "exact")


def window_indices(total: int, num_frames: int, interval: int, u: float) -> NDArray[np.int64]:
    """The frames of a clip: `num_frames` of them, evenly over a window of `num_frames * interval` (spec 7, "Crop").

    Args:
        total: frames of the file.
        interval: frames of the file for each of the clip's.
        u: uniform in [0, 1): where the window begins.

    Raises:
        ValueError: the file has fewer frames than the clip.
    """
    if total < num_frames:
        raise ValueError(f"too few frames: {total} for a clip of {num_frames}")
    size = num_frames * interval
    begin = int(u * window_positions(total, num_frames, interval))
    end = min(begin + size, total)
    return np.linspace(begin, end - 1, num_frames, dtype=np.int64)


def window_positions(total: int, num_frames: int, interval: int) -> int:
    """The number of frames at which a window of `window_indices` can begin."""
    return max(0, total - num_frames * interval - 1) + 1


def read_clip(path: str | Path, indices: Sequence[int], height: int, width: int, resize: str = "fast") -> Tensor:
    """The frames `indices` of a video or image, resized to cover height x width and cropped about the centre.

    Only the frames from the keyframe before the first index to the last one are decoded, and one at a time is held
    besides the clip. Images: index 0 alone, resized by PIL's bicubic filter.

    Args:
        path: a file's, or a URL (see `remote`).
        indices: strictly ascending frame numbers.
        resize: "fast": swscale's area filter; uint8. "exact": `interpolate` (bilinear, no antialiasing) of the full
            frames in [0, 1], as the reference does; float32, normalised to [-1, 1].

    Returns:
        [3, T, H, W].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: (a MediaError) it cannot be read or has fewer frames; never a short clip.
    """
    path, indices = locate(path), [int(index) for index in indices]
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize='{resize}' is unknown: one of {', '.join(RESIZE_MODES)}")
    if not indices or indices[0] < 0 or any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"indices={indices} are not strictly ascending frame numbers")
    require_file(path)
    if is_image(path):
        if indices != [0]:
            raise MediaError(path, f"too few frames: an image, number {indices[-1]} (from 0) was asked for")
        clip = _read_image(path, height, width)
        return normalise(clip, torch.float32) if resize == "exact" else clip
    exact = resize == "exact"
    resizer = _ExactResizer(height, width) if exact else _FastResizer(height, width)
    clip = np.empty((3, len(indices), height, width), dtype=np.float32 if exact else np.uint8)
    place = {number: i for i, number in enumerate(indices)}
    for number, frame in read_frames(path, indices):
        resizer.write(frame, clip[:, place[number]])
    return torch.from_numpy(clip)


def _read_image(path: Path, height: int, width: int) -> Tensor:
    """uint8 [3, 1, H, W]."""
    with open_image(path) as image:
        image = to_rgb(image)
        cover_height, cover_width = cover_size(image.height, image.width, height, width)
        image = image.resize((cover_width, cover_height), Image.Resampling.BICUBIC)
    pixels = np.array(image)[centre_crop(cover_height, cover_width, height, width)]  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)[:, None].contiguous()


class _FastResizer:
    """Scales and converts to RGB in one pass of swscale."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.turn: Orientation | None = None  # all frames are turned as the first one is
        self.reformatter = VideoReformatter()  # keeps its tables from one frame to the next

    def write(self, frame: VideoFrame, out: NDArray[np.uint8]) -> None:
        """The frame into `out`: [3, H, W]."""
        turn = self.turn = self.turn or orientation(frame)
        target = (self.width, self.height) if turn.transposed else (self.height, self.width)  # as stored
        cover = cover_size(frame.height, frame.width, *target)
        # Planar output has the pixels of rgb24 in half the time.
        small = self.reformatter.reformat(
            frame, height=cover[0], width=cover[1], format="gbrp", interpolation=Interpolation.AREA, threads=1
        )
        green, blue, red = small.planes
        for channel, plane in enumerate((red, green, blue)):
            pixels = np.frombuffer(plane, np.uint8).reshape(cover[0], plane.line_size)
            out[channel] = turn.apply(pixels[centre_crop(*cover, *target)])


class _ExactResizer:
    """Scales full frames as the reference does."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.turn: Orientation | None = None
        self.reformatter = VideoReformatter()

    def write(self, frame: VideoFrame, out: NDArray[np.float32]) -> None:
        """The frame into `out`: [3, H, W], in [-1, 1]."""
        self.turn = self.turn or orientation(frame)
        pixels = self.turn.apply(self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        full = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float().div_(255)  # [1, 3, h, w]
        cover = cover_size(*full.shape[2:], self.height, self.width)
        scaled = interpolate(full, size=cover, mode="bilinear", align_corners=False)[0]  # [3, h', w']
        rows, columns = centre_crop(*cover, self.height, self.width)
        out[:] = scaled[:, rows, columns].sub(0.5).div_(0.5).numpy()
