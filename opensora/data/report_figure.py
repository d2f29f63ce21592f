"""The picture of an epoch: samples and tokens of each clip size and length."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from opensora.data.report import BucketCount, EpochReport, human

_COLOURS = ("#3b6fb6", "#d9822b", "#3c9a5f", "#a4508b", "#7a7a7a")
_LEFT_OUT = "#c9ccd1"
_BAR_INCHES, _FRAME_INCHES = 0.21, 2.2


def draw_report(report: EpochReport, path: Path, title: str) -> None:
    """Write a png: samples on the left, tokens on the right, a bar per resolution and length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = _in_order(report.by_clip())
    figure = Figure(figsize=(12, _FRAME_INCHES + _BAR_INCHES * max(len(counts), 6)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    _bars(panels[0], counts, [count.seen for count in counts], [count.left_over for count in counts])
    _bars(panels[1], counts, [count.tokens for count in counts], None)
    panels[0].set_xlabel("samples per epoch")
    panels[1].set_xlabel("video tokens per epoch")
    panels[0].set_yticks(range(len(counts)), [_label(count) for count in counts], fontsize=8)
    panels[0].set_ylim(len(counts) - 0.4, -0.6)
    _legend(panels[1], counts)
    everything = report.total()
    dropped = report.rows - everything.samples
    figure.suptitle(
        f"{title}\n{everything.seen:,} of {report.rows:,} rows ({everything.left_over:,} left over, {dropped:,} in no "
        f"bucket), {human(everything.tokens)} tokens, {report.updates:,} updates of {report.ranks} ranks, "
        f"balance {report.balance:.3f}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _in_order(counts: list[BucketCount]) -> list[BucketCount]:
    """Resolutions as they come, highest first; within one from images to the longest clips."""
    groups = [list(group) for _, group in groupby(counts, key=_resolution)]
    return [count for group in groups for count in sorted(group, key=lambda count: count.num_frames)]


def _resolution(count: BucketCount) -> str:
    return count.key.split("/")[0]


def _label(count: BucketCount) -> str:
    length = "image" if count.num_frames == 1 else f"{count.num_frames} frames"
    return f"{_resolution(count)}  {length}  x{count.batch_size}"


def _colours(counts: list[BucketCount]) -> dict[str, str]:
    names = dict.fromkeys(map(_resolution, counts))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _bars(panel, counts: list[BucketCount], values: list[int], beyond: list[int] | None) -> None:
    """Horizontal bars with their value and share; `beyond`: what is left out, drawn after the bar."""
    colours, total = _colours(counts), max(sum(values), 1)
    places = range(len(counts))
    panel.barh(places, values, color=[colours[_resolution(count)] for count in counts], height=0.78)
    if beyond is not None:
        panel.barh(places, beyond, left=values, color=_LEFT_OUT, height=0.78)
    ends = [value + (beyond[i] if beyond else 0) for i, value in enumerate(values)]
    for place, value, end in zip(places, values, ends, strict=True):
        panel.annotate(
            f"{human(value)}  {value / total:.1%}", (end, place), (4, 0), textcoords="offset points", fontsize=7,
            va="center",
        )  # fmt: skip
    panel.set_xlim(0, max([1, *ends]) * 1.22)
    panel.xaxis.set_major_formatter(lambda value, _: human(value))
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(panel, counts: list[BucketCount]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in _colours(counts).items()]
    panel.legend(handles=[*patches, Patch(color=_LEFT_OUT, label="left over (samples)")], fontsize=8, frameon=True)
