"""What a clip shows, measured from its pixels: the colour, the shape and the direction of motion of its one object.

Classical image processing, so that the figures of the demo rest on no other network: the object is what differs from
the background, its colour is the nearest hue, its direction the slope of its centroid, and its shape the best of many
templates against the average of all frames with the motion taken out.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from render import COLOURS, DIRECTIONS, SHAPES, Subject, coverage


def measure(frames: np.ndarray) -> Subject:
    """The subject that uint8 frames [T, H, W, 3] show. There is always an answer, also for noise: its best guess."""
    saliency = salient(frames)  # [T, H, W] in [0, 1]
    centres = np.stack([find_centre(s) for s in saliency])  # [T, 2] (x, y)
    return Subject(nearest_colour(frames, saliency), nearest_shape(saliency, centres), nearest_direction(centres))


def salient(frames: np.ndarray) -> np.ndarray:
    """How far each pixel is from the background, 1 in the core of the object: [T, H, W]."""
    pixels = frames.astype(np.float32)
    background = np.median(pixels, axis=(0, 1, 2))
    distance = smooth(np.linalg.norm(pixels - background, axis=-1))
    core = np.percentile(distance, 97, axis=(1, 2), keepdims=True)  # the object covers 8 % of a frame or more
    return np.clip(distance / np.maximum(core, 1e-6), 0, 1)


def smooth(images: np.ndarray) -> np.ndarray:
    """3 x 3 binomial filter over the last two axes."""
    for axis in (-2, -1):
        padded = np.pad(images, [(1, 1) if a == axis % images.ndim else (0, 0) for a in range(images.ndim)], "edge")
        size = images.shape[axis]
        before, here, after = (np.take(padded, range(i, i + size), axis) for i in range(3))
        images = (before + 2 * here + after) / 4
    return images


def find_centre(saliency: np.ndarray) -> np.ndarray:
    """The object's centroid (x, y) in one frame [H, W]: a window that moves to the centre of what it holds."""
    height, width = saliency.shape
    y, x = np.mgrid[:height, :width] + 0.5
    weight = np.clip(saliency - 0.4, 0, None)
    window, centre = np.ones_like(weight), np.array([width / 2, height / 2])
    for _ in range(8):
        held = weight * window
        centre = np.array([(held * x).sum(), (held * y).sum()]) / max(held.sum(), 1e-6)
        window = np.hypot(x - centre[0], y - centre[1]) < 0.35 * width
    return centre


def nearest_colour(frames: np.ndarray, saliency: np.ndarray) -> str:
    """The palette's colour with the nearest hue to the core of the object."""
    weight = np.clip(saliency - 0.6, 0, None)[..., None]
    mean = (weight * frames).sum((0, 1, 2)) / max(weight.sum(), 1e-6)
    return min(COLOURS, key=lambda name: hue_distance(mean, COLOURS[name]))


def hue_distance(one, other) -> float:
    """Between two RGB colours (0 to 255): 0 to 0.5 of a turn."""
    a, b = (colorsys.rgb_to_hsv(*(float(v) / 255 for v in colour))[0] for colour in (one, other))
    return min(abs(a - b), 1 - abs(a - b))


def nearest_direction(centres: np.ndarray) -> str | None:
    """The direction of the least-squares line through the centroids [T, 2]; None for a single frame."""
    if len(centres) == 1:
        return None
    time = np.arange(len(centres)) - (len(centres) - 1) / 2
    slope = time @ (centres - centres.mean(0))  # [2], up to a factor
    return max(DIRECTIONS, key=lambda name: slope @ np.array(DIRECTIONS[name]))


def nearest_shape(saliency: np.ndarray, centres: np.ndarray) -> str:
    """The shape of the template with the highest Dice coefficient to the motion-compensated mean of the frames."""
    size = saliency.shape[-1]
    half = round(0.36 * size)
    mean = np.mean([cut_out(s, c, half) for s, c in zip(saliency, centres, strict=True)], axis=0).ravel()
    names, masks, energy = templates(half, size)
    dice = 2 * masks @ mean / (energy + mean @ mean)
    return names[int(dice.argmax())]


def cut_out(image: np.ndarray, centre: np.ndarray, half: int) -> np.ndarray:
    """The square of 2*half pixels around `centre` (x, y), interpolated linearly; 0 outside the image."""
    padded = np.pad(image, half + 1)
    left, top = centre + 1  # of the square, in the padded image
    column, row = int(np.floor(left)), int(np.floor(top))
    fx, fy = left - column, top - row
    square = padded[row : row + 2 * half + 1, column : column + 2 * half + 1]
    square = square[:, :-1] * (1 - fx) + square[:, 1:] * fx
    return square[:-1] * (1 - fy) + square[1:] * fy


@lru_cache
def templates(half: int, size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Each shape at many sizes and small offsets, smoothed as the frames: names, masks [N, (2 half)²], energies [N]."""
    radii = size * np.linspace(0.1, 0.3, 21)
    offsets = [(x, y) for x in (-1.5, 0, 1.5) for y in (-1.5, 0, 1.5)]
    cases = [(shape, radius, offset) for shape in SHAPES for radius in radii for offset in offsets]
    masks = np.stack([coverage(s, r, (half + x, half + y), 2 * half, 2 * half) for s, r, (x, y) in cases])
    masks = smooth(masks.astype(np.float32)).reshape(len(cases), -1)
    return [shape for shape, _, _ in cases], masks, (masks**2).sum(1)
