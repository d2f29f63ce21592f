import random

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.inference.contact_sheet import FRAME_SIDE, INK, MARGIN, PAPER, Entry, read_frames, write_contact_sheet
from opensora.inference.metadata import has_tags, read_comment
from opensora.inference.output import save_sample

COLOURS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (180, 180, 30), (150, 30, 150)]


def sample(folder, name, colours, height=32, width=48):
    """A file of one frame for each colour."""
    frames = torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, height, width, 3)
    save_sample(folder / name, frames, 8, 0, "a prompt")
    return folder / name


def sheet(tmp_path, entries):
    write_contact_sheet(tmp_path / "sheet.png", entries)
    return np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)


def test_first_middle_and_last_frame_of_a_video(tmp_path):
    frames = read_frames(sample(tmp_path, "a.mp4", COLOURS))
    assert len(frames) == 3
    for frame, colour in zip(frames, COLOURS[::2], strict=True):
        assert np.abs(np.asarray(frame).astype(int) - colour).mean() < 8


def test_every_sample_has_its_place(tmp_path):
    entries = [Entry(sample(tmp_path, f"{i}.png", [colour], 64, 64), f"number {i}") for i, colour in enumerate(COLOURS)]
    pixels = sheet(tmp_path, entries)
    width, height = (
        FRAME_SIDE + 2 + MARGIN,
        next(y for y in range(MARGIN + FRAME_SIDE, 2000) if (pixels[y, MARGIN + 5] == COLOURS[2]).all()),
    )
    for i, colour in enumerate(COLOURS):  # two in a row: a cell is higher than wide
        x, y = MARGIN + i % 2 * width + 5, MARGIN + i // 2 * (height - MARGIN) + 5
        assert (pixels[y, x] == colour).all()
    below = pixels[MARGIN + FRAME_SIDE : height]
    assert (np.abs(below - INK).sum(axis=-1) < 60).sum() > 20  # its prompt, in ink
    assert (pixels[:MARGIN] == PAPER).all()


def test_long_prompts_are_cut_and_stay_within_their_cell(tmp_path):
    path = sample(tmp_path, "a.png", COLOURS[:1])
    long = sheet(tmp_path, [Entry(path, "wide words of a long prompt " * 40), Entry(path, "a")])
    columns = FRAME_SIDE + 2
    assert long.shape[0] < 300
    gap = long[:, MARGIN + columns : MARGIN + columns + MARGIN]
    assert (gap == PAPER).all()


@pytest.mark.parametrize("prompt", ["", "雨が降る海" * 30, "a\nb\tc", "x" * 500])
def test_any_prompt_can_be_drawn(tmp_path, prompt):
    assert sheet(tmp_path, [Entry(sample(tmp_path, "a.mp4", COLOURS[:1] * 5), prompt)]).size


def test_a_broken_file_does_not_break_the_sheet(tmp_path):
    for name in ("a.mp4", "a.png"):
        (tmp_path / name).write_bytes(b"mine")
    assert sheet(tmp_path, [Entry(tmp_path / "a.mp4", "a"), Entry(tmp_path / "a.png", "b")]).size


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_damaged_files_are_grey_or_what_can_be_read_of_them(tmp_path, name):
    path, draw = tmp_path / name, random.Random(0)
    save_sample(path, torch.zeros(1 if name == "a.png" else 5, 32, 48, 3, dtype=torch.uint8), 8, 10, "p")
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        assert read_frames(path)
        has_tags(path, {"title": "p"}), read_comment(path)
