"""Samples as files: mp4 for videos, png for single frames, the prompt beside them. A file that is there is whole."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from opensora.durable import whole_file, write_whole


def to_uint8(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3] on the host, rounded to nearest."""
    video = video.float().clamp(-1, 1).add(1).mul(127.5).round()
    return video.to(torch.uint8).permute(1, 2, 3, 0).cpu()


def output_folder(save_dir: str | Path, num_frames: int, resolution: str) -> Path:
    """`{save_dir}/image_256px` or `{save_dir}/video_256px`."""
    return Path(save_dir) / f"{'image' if num_frames == 1 else 'video'}_{resolution}"


def sample_suffix(num_frames: int) -> str:
    return ".png" if num_frames == 1 else ".mp4"


def check_writable(folder: Path, setting: str) -> None:
    """ValueError unless files can be written to the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{setting}: {folder} cannot be written ({error.strerror}): give another one") from error


def save_sample(
    path: Path, frames: Tensor, fps: float, crf: int, prompt: str, tags: Mapping[str, str] | None = None
) -> None:
    """Write frames (uint8 [T, H, W, 3]) to `path`, png or mp4 by its name, and the prompt to the `.txt` beside it.

    The sample comes last, under its final name only when it is complete: where it exists, all of it does.

    tags: kept in the file: text chunks of a png by any name; of an mp4 "title" and "comment" among others.
    """
    write_whole(path.with_suffix(".txt"), prompt + "\n")
    if path.suffix == ".png":
        write_png(path, frames[0], tags)
    else:
        with whole_file(path) as temporary:
            write_mp4(temporary, frames, fps, crf, tags)


def write_png(path: Path, image: Tensor, tags: Mapping[str, str] | None = None) -> None:
    """An image uint8 [H, W, 3], with `tags` as text chunks; the file appears when it is complete."""
    chunks = PngInfo()
    for name, text in (tags or {}).items():
        chunks.add_itxt(name, text)  # in UTF-8
    picture = Image.fromarray(image.numpy())
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def write_mp4(path: Path, frames: Tensor, fps: float, crf: int, tags: Mapping[str, str] | None = None) -> None:
    """H.264 in yuv420p, which every player takes, at exactly `fps` frames a second.

    frames: uint8 [T, H, W, 3]. yuv420p needs even sizes: an odd last row or column is repeated.
    """
    pixels = frames.numpy()
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream("libx264", rate=Fraction(str(fps)), options={"crf": str(crf)})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The matrix that rgb24 is converted with (BT.601), said in the file: players guess BT.709 for large videos.
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        stream.codec_context.color_range = ColorRange.MPEG
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
