"""The clips that training sees, as files to look at."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from opensora.data.batch import Batch
from opensora.data.bucket import Bucket, BucketTable
from opensora.data.loader import build_loader
from opensora.data.sampler import SampleRequest

_FPS_IF_UNKNOWN = 24.0
_COLUMNS = ("file", "row", "bucket", "num_frames", "height", "width", "fps", "update", "path", "text", "unreadable")


class Clip(NamedTuple):
    """A sample as training gets it.

    Attributes:
        name: of its file, without suffix.
        facts: what `_COLUMNS` lists of it.
        frames: uint8 [T, H, W, 3].
    """

    name: str
    facts: dict[str, object]
    frames: Tensor


def write_preview(
    dataset: Dataset,
    buckets: BucketTable,
    micro_batches: Iterable[list[SampleRequest]],
    count: int,
    folder: Path,
    save: Callable[[Path, Tensor, float, str], None],
    to_uint8: Callable[[Tensor], Tensor],
) -> int:
    """Write the first `count` samples of `micro_batches`, a list of them (samples.csv) and a contact sheet
    (samples.png).

    Args:
        dataset: reads the samples, as in training.
        save: writes (path, uint8 [T, H, W, 3], frames per second, caption); png or mp4 by the path's suffix.
        to_uint8: [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3], for a dataset that hands out floats.

    Returns:
        How many there were: fewer than `count` if the epoch is that short.

    Raises:
        ValueError: a sample can't be read, nor any of its substitutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet = ContactSheet()
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for clip in _clips(dataset, buckets, micro_batches, count, to_uint8):
            path = folder / f"{clip.name}{'.mp4' if len(clip.frames) > 1 else '.png'}"
            save(path, clip.frames, clip.facts["fps"] or _FPS_IF_UNKNOWN, clip.facts["text"])
            writer.writerow({"file": path.name, **clip.facts})
            sheet.add(clip)
    if len(sheet):
        sheet.draw().save(folder / "samples.png")
    return len(sheet)


def _clips(
    dataset: Dataset,
    buckets: BucketTable,
    micro_batches: Iterable[list[SampleRequest]],
    count: int,
    to_uint8: Callable[[Tensor], Tensor],
) -> Iterator[Clip]:
    requests = list(islice((request for micro_batch in micro_batches for request in micro_batch), count))
    places = {(b.num_frames, b.height, b.width): b for b in buckets.buckets}
    # One at a time: a whole micro-batch of long clips can be gigabytes.
    batches = build_loader(dataset, [[request] for request in requests])
    for number, (request, batch) in enumerate(zip(requests, batches, strict=True)):
        bucket = places[request[1:4]]
        video = batch.video[0]  # [3, T, H, W]
        frames = to_uint8(video) if video.is_floating_point() else video.permute(1, 2, 3, 0)
        name = f"{number:04}_{bucket.clip_key.replace('/', '-')}_{bucket.width}x{bucket.height}_row{batch.index[0]}"
        yield Clip(name, _facts(dataset, bucket, batch), frames.contiguous())


def _facts(dataset: Dataset, bucket: Bucket, batch: Batch) -> dict[str, object]:
    row = batch.index[0]
    return {
        "row": row,
        "bucket": bucket.clip_key,  # its size is in the next columns; several ratios can have the same
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": batch.fps[0],
        "update": batch.update,
        "path": dataset.table.path(row),
        "text": batch.text[0],
        "unreadable": "; ".join(f"{failure['path']}: {failure['reason']}" for failure in batch.rejected),
    }


class ContactSheet:
    """Clips side by side: some frames of each, its bucket and its caption."""

    columns, tiles = 3, 4
    tile, gap, line = 120, 10, 14  # pixels: largest side of a frame, space between cells, height of a line of text

    def __init__(self):
        self._cells: list[tuple[list[Image.Image], list[str]]] = []

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, clip: Clip) -> None:
        chosen = np.linspace(0, len(clip.frames) - 1, min(self.tiles, len(clip.frames))).astype(int)
        tiles = [Image.fromarray(clip.frames[i].numpy()) for i in chosen.tolist()]
        tiles = [ImageOps.contain(tile, (self.tile, self.tile)) for tile in tiles]
        facts = clip.facts
        fps = f", {facts['fps']:g} fps" if facts["fps"] else ""
        size = f"{facts['width']} x {facts['height']}"
        head = f"{clip.name.split('_')[0]}  {facts['bucket']}, {size}{fps}, row {facts['row']}"
        self._cells.append((tiles, [head, *_fitted(str(facts["text"]), self._width, lines=2)]))

    def draw(self) -> Image.Image:
        rows = -(-len(self) // self.columns)
        columns = min(self.columns, len(self))
        width, height = self._width + self.gap, self.tile + 3 * self.line + self.gap
        sheet = Image.new("RGB", (columns * width + self.gap, rows * height + self.gap), "white")
        pen = ImageDraw.Draw(sheet)
        for index, (tiles, texts) in enumerate(self._cells):
            left, top = self.gap + index % columns * width, self.gap + index // columns * height
            for i, tile in enumerate(tiles):
                sheet.paste(tile, (left + i * (self.tile + 2), top + self.tile - tile.height))
            for i, text in enumerate(texts):
                colour = "#555555" if i else "black"
                pen.text((left, top + self.tile + 2 + i * self.line), text, fill=colour, font=_font())
        return sheet

    @property
    def _width(self) -> int:
        return self.tiles * (self.tile + 2)


def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


def _fitted(text: str, width: int, lines: int) -> list[str]:
    """As many lines of at most `width` pixels as there may be; what does not fit ends in an ellipsis."""
    font, words, fitted = _font(), text.split(), []
    while words and len(fitted) < lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        fitted.append(line)
    if words:
        fitted[-1] += " …"
    while fitted and font.getlength(fitted[-1]) > width:
        fitted[-1] = f"{fitted[-1].rstrip(' …')[:-1]} …"
    return fitted
