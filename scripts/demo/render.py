"""Draw coloured shapes that move, and write and read them as real video and image files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

COLOURS = {"red": (225, 45, 45), "green": (45, 190, 75), "blue": (55, 95, 235), "yellow": (240, 205, 50)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
BACKGROUND = (22, 24, 30)
FPS = 12


class Subject(NamedTuple):
    """What a clip shows: the words of its prompt. An image has no direction."""

    colour: str
    shape: str
    direction: str | None = None

    @property
    def prompt(self) -> str:
        still = f"a {self.colour} {self.shape}"
        return f"{still} moving {self.direction}" if self.direction else still

    @classmethod
    def of(cls, prompt: str) -> Subject | None:
        """The subject that a prompt names, whatever else the prompt says; None if colour or shape is not named."""
        words = prompt.lower().replace(".", " ").replace(",", " ").split()
        colour, shape, direction = (
            next((word for word in words if word in known), None) for known in (COLOURS, SHAPES, DIRECTIONS)
        )
        return cls(colour, shape, direction) if colour and shape else None


def subjects() -> list[Subject]:
    """All 48 combinations, colour first."""
    return [Subject(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def coverage(shape: str, radius: float, centre: tuple[float, float], height: int, width: int) -> np.ndarray:
    """The antialiased mask of a shape: [height, width] in [0, 1].

    `radius` (pixels) is that of the circle; the square and the triangle are sized to look about as large. The triangle
    is equilateral, points up, and has its centroid at `centre` (x, y).
    """
    x = np.arange(width) + 0.5 - centre[0]
    y = (np.arange(height) + 0.5 - centre[1])[:, None]
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    elif shape == "triangle":
        inner = 0.7 * radius  # of the inscribed circle
        distance = np.maximum(y, np.abs(x) * np.sqrt(0.75) - y / 2) - inner
    else:
        raise ValueError(f"shape '{shape}' is unknown: one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(mask: np.ndarray, colour: str) -> np.ndarray:
    """A mask [H, W] in [0, 1] in its colour over the background: uint8 [H, W, 3]."""
    mask = mask[..., None]
    return np.rint(mask * np.array(COLOURS[colour]) + (1 - mask) * np.array(BACKGROUND)).astype(np.uint8)


def draw_clip(subject: Subject, num_frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A clip of a subject that crosses the middle of the picture: uint8 [T, size, size, 3].

    Size, place and speed vary a little: enough that no two clips are the same, so little that a small model learns
    what the words mean in minutes.
    """
    radius = size * rng.uniform(0.19, 0.21)
    speed = size * rng.uniform(0.036, 0.044)  # pixels per frame: crosses a third of the picture in 9 frames
    travel = np.array(DIRECTIONS.get(subject.direction, (0, 0))) * speed * (num_frames - 1)
    middle = size / 2 + size * rng.uniform(-0.05, 0.05, size=2)
    centres = middle + travel * np.linspace(-0.5, 0.5, num_frames)[:, None]  # [T, 2]
    return np.stack([draw(coverage(subject.shape, radius, tuple(c), size, size), subject.colour) for c in centres])


def write_video(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write uint8 [T, H, W, 3] as H.264 in mp4, at a quality where the colours stay clean."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video or image file: uint8 [T, H, W, 3]."""
    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    with av.open(str(path)) as container:
        return np.stack(list(_rgb_frames(container)))


def _rgb_frames(container) -> Iterator[np.ndarray]:
    for frame in container.decode(video=0):
        yield frame.to_ndarray(format="rgb24")
