"""Real media files, small ones, written with PyAV; and the plainest way to decode one, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def draw_frame(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: a smooth picture that differs from number to number, with a bar that moves and no symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([columns * 200 // width, rows * 200 // height, np.full_like(rows, number * 5 % 200)], axis=-1)
    left = number * 3 % width
    picture[height // 4 : height // 3, left : left + width // 6] = 250
    return picture.astype(np.uint8)


def write_video(
    path: Path,
    num_frames: int = 40,
    height: int = 48,
    width: int = 64,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    rate: int | Fraction = 24,
    rotation: int | None = None,
    times: Sequence[int] | None = None,
) -> Path:
    """Frames of `draw_frame`. x264 as the default: groups of at most 12 pictures, with B-frames.

    Args:
        options, container: of the encoder and of the muxer.
        rotation: degrees counter-clockwise that a player turns the pictures by.
        times: of the frames in 1 / 1000 s, for a variable rate.
    """
    if options is None:
        options = {"x264-params": "keyint=12:bframes=3:b-adapt=0", "preset": "fast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options | {"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, height, width), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def copy_video(source: Path, target: Path, drop: int = 0, container: dict[str, str] | None = None) -> Path:
    """Copy the packets without encoding them anew; the first `drop` frames are hidden (an edit list in mp4)."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=container or {}) as file:
        stream = given.streams.video[0]
        copied = file.add_stream_from_template(stream)
        step = int(1 / (stream.average_rate * stream.time_base))
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - drop * step, packet.dts - drop * step
                packet.stream = copied
                file.mux(packet)
    return target


def write_audio(path: Path) -> Path:
    """A second of silence and no video."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut_file(source: Path, target: Path, fraction: float) -> Path:
    """The first part of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def decode_all(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3] of the whole file, as stored."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
