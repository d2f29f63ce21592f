"""All samples of a call on one picture: a few frames of each with its prompt under them."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
from PIL import Image, ImageDraw, ImageFont

from opensora.durable import whole_file
from opensora.inference.metadata import UNREADABLE

FRAMES = 3  # of a video: the first, the middle and the last
FRAME_SIDE = 160  # pixels of a frame's longer side
FONT_SIZE = 13
LINES = 4  # of a prompt; what is longer is cut
MARGIN = 8
MOST = 400  # samples on one sheet
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


class Entry(NamedTuple):
    """A sample's file and the prompt that it shows."""

    path: Path
    prompt: str


def write_contact_sheet(path: Path, entries: Sequence[Entry]) -> None:
    """A png of the first `MOST` samples, row by row, about as wide as high."""
    shown, font = entries[:MOST], _font()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # to show a video's end, all of it is decoded
        frames = pool.map(_small_frames, (entry.path for entry in shown))
        cells = [_cell(entry, small, font) for entry, small in zip(shown, frames, strict=True)]
    width, height = (max(getattr(cell, side) for cell in cells) + MARGIN for side in ("width", "height"))
    columns = max(1, min(len(cells), round(math.sqrt(len(cells) * height / width))))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    for i, cell in enumerate(cells):
        sheet.paste(cell, (MARGIN + i % columns * width, MARGIN + i // columns * height))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _small_frames(path: Path) -> list[Image.Image]:
    return [_small(frame) for frame in read_frames(path)]


def _cell(entry: Entry, frames: Sequence[Image.Image], font: ImageFont.FreeTypeFont) -> Image.Image:
    width = max(sum(frame.width + 2 for frame in frames), FRAME_SIDE)
    lines = [entry.path.stem, *_wrapped(entry.prompt, width, font)]
    line_height = FONT_SIZE + 4
    top = max(frame.height for frame in frames) + 4
    cell = Image.new("RGB", (width, top + len(lines) * line_height), PAPER)
    left = 0
    for frame in frames:
        cell.paste(frame, (left, 0))
        left += frame.width + 2
    draw = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        draw.text((0, top + i * line_height), line, fill=INK if i else FAINT, font=font)
    return cell


def read_frames(path: Path) -> list[Image.Image]:
    """A png, or the first, middle and last frame of a video; a grey one for a file that can't be read."""
    try:
        frames = _read_image(path) if path.suffix == ".png" else _read_video(path)
    except UNREADABLE:
        frames = []
    return frames or [Image.new("RGB", (FRAME_SIDE, FRAME_SIDE // 2), FAINT)]


def _read_image(path: Path) -> list[Image.Image]:
    with Image.open(path) as image:
        return [image.convert("RGB")]


def _read_video(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        last = container.streams.video[0].frames - 1
        wanted = {round(i * last / (FRAMES - 1)) for i in range(FRAMES)}
        return [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in wanted]


def _small(frame: Image.Image) -> Image.Image:
    """Its longer side FRAME_SIDE, small ones enlarged without smoothing."""
    scale = FRAME_SIDE / max(frame.size)
    size = tuple(max(1, round(side * scale)) for side in frame.size)
    return frame.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(prompt: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The prompt in lines of at most `width` pixels."""
    text = " ".join(prompt.split())
    per_line = max(8, int(width / (font.getlength(text) / max(len(text), 1) or 1)))
    while True:
        lines = textwrap.wrap(text, per_line, max_lines=LINES, placeholder=" …")
        if per_line <= 8 or all(font.getlength(line) <= width for line in lines):
            return lines
        per_line -= 1


def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans knows more scripts than Pillow's own font, which is for where that is not installed."""
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
        return ImageFont.truetype(str(path), FONT_SIZE)
    except (ImportError, OSError):
        return ImageFont.load_default(FONT_SIZE)
