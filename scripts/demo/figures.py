"""The demo's two pictures: a contact sheet of the samples and the curve of the training loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 6
FRAMES = 4  # shown of each clip, first to last
TILE = 72  # pixels of a frame's side
LABEL = 18
GAP = 8


def contact_sheet(cells: list[tuple[str, bool, np.ndarray]], path: Path) -> None:
    """Write a sheet of six columns; a cell is (prompt, whether all of it is right, uint8 frames [T, H, W, 3]).

    The cells go down the columns, so that with the 48 prompts in their order each row is one direction.
    """
    rows = -(-len(cells) // COLUMNS)
    width, height = FRAMES * (TILE + 1) + GAP, TILE + LABEL + GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (prompt, right, frames) in enumerate(cells):
        left, top = GAP + index // rows * width, GAP + index % rows * height
        pen.text(
            (left, top), prompt if right else f"{prompt} (not right)", fill="black" if right else "#b00020", font=font
        )
        for column, frame in enumerate(frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)]):
            tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + column * (TILE + 1), top + LABEL))
    sheet.save(path)


def loss_curve(metrics: Path, path: Path) -> None:
    """Write the curve of loss, gradient norm and learning rate from a run's metrics.jsonl (one object per update)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    steps = [line["step"] for line in lines]
    figure, panels = pyplot.subplots(3, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1, 1), layout="constrained")
    for panel, key in zip(panels, ("loss", "grad_norm", "lr"), strict=True):
        values = np.array([line[key] for line in lines], dtype=float)
        panel.plot(steps, values, color="tab:blue", alpha=1.0 if key == "lr" else 0.3, linewidth=1)
        if key != "lr":
            panel.plot(steps, moving_average(values), color="tab:blue", linewidth=1.8)
            panel.set_yscale("log")
        panel.set_ylabel(key.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].set_title("Training loss, with its moving average")
    panels[-1].set_xlabel("optimizer update")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def moving_average(values: np.ndarray, half_life: float = 15) -> np.ndarray:
    """Exponential average with its start corrected; NaN (an update without the figure) is passed over."""
    keep, total, weight, averages = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else np.nan)
    return np.array(averages)
