"""Line charts and bars as SVG: no script, and colours that the page's style sheet gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 26
BINS = 140  # at most so many points are drawn of a line
NUM_COLOURS = 8  # in the style sheet, as classes c0, c1, ...


@dataclass(frozen=True)
class Line:
    """A line of a chart: (x, y) points with rising x."""

    label: str
    points: Points
    colour: int


@dataclass(frozen=True)
class _Bin:
    """Neighbouring points as one."""

    x: float
    mean: float
    low: float
    high: float
    count: int


def line_chart(title: str, lines: Sequence[Line], log: bool = False, x_label: str = "step") -> str:
    """A figure with a legend where there are several lines; "" if there is nothing to draw.

    Where a line has more points than are drawn, means of neighbours are, over a band from the lowest to the highest.

    log: a logarithmic y axis, if all values are above 0.
    """
    drawn = [(line, binned(line.points)) for line in lines if line.points]
    if not drawn:
        return ""
    bins = [point for _, points in drawn for point in points]
    log = log and all(point.low > 0 for point in bins)
    x_axis = _Axis(min(p.x for p in bins), max(p.x for p in bins), LEFT, WIDTH - RIGHT)
    low, high = _span(bins, log)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x_axis, y_axis)]
    for line, points in drawn:
        parts += [_band(points, x_axis, y_axis, line.colour), _path(points, x_axis, y_axis, line.colour)]
        parts += [_dot(line.label, point, x_axis, y_axis, line.colour) for point in points]
    legend = "".join(_legend(line) for line, _ in drawn) if len(drawn) > 1 else ""
    note = " (logarithmic)" if log else ""
    return (
        f'<figure><figcaption>{escape(title)}<span class="note">{note} by {escape(x_label)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def stacked_bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], unit: str) -> str:
    """A bar for each row, of named parts that add up."""
    names = list(dict.fromkeys(name for _, parts in rows for name, value in parts.items() if value > 0))
    longest = max((sum(parts.values()) for _, parts in rows), default=0)
    if not names or longest <= 0:
        return ""
    bars = []
    for place, (label, parts) in enumerate(rows):
        y, x = 6 + place * 44, 4.0
        total = sum(parts.values())
        bars.append(f'<text x="4" y="{y + 9}" class="tick">{escape(label)}: {number(total)} {unit}</text>')
        for colour, name in enumerate(names):
            width = (WIDTH - 8) * parts.get(name, 0.0) / longest
            tip = f"{name}: {number(parts.get(name, 0.0))} {unit}, {parts.get(name, 0.0) / (total or 1):.0%}"
            bars.append(
                f'<rect x="{x:.1f}" y="{y + 14}" width="{width:.1f}" height="18" class="area c{colour % NUM_COLOURS}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            x += width
    legend = "".join(_legend(Line(name, [], colour)) for colour, name in enumerate(names))
    height = 12 + 44 * len(rows)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(bars)}</svg><div class="legend">{legend}</div></figure>'
    )


def binned(points: Points, bins: int = BINS) -> list[_Bin]:
    """Points in at most `bins` groups of neighbours, of like numbers."""
    size = -(-len(points) // bins)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [
        _Bin(
            x=group[-1][0],
            mean=math.fsum(y for _, y in group) / len(group),
            low=min(y for _, y in group),
            high=max(y for _, y in group),
            count=len(group),
        )
        for group in groups
    ]


def number(value: float) -> str:
    """Short for a person: 1,234, 0.0123, 1.2e-05, 3.4M."""
    size = abs(value)
    if size >= 1e6:
        for divisor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
            if size >= divisor:
                return f"{value / divisor:.3g}{suffix}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = 0.5 if high <= low else (self._scaled(value) - low) / (high - low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if not self.log or self.high < 8 * self.low:
            return ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) < 4 else (1,)
        marks = [factor * 10.0**decade for decade in decades for factor in factors]
        return [mark for mark in marks if self.low <= mark <= self.high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _span(bins: Sequence[_Bin], log: bool) -> tuple[float, float]:
    """What the y axis shows: the lines with some room, and of their bands what does not press the lines flat."""
    means = sorted(point.mean for point in bins)
    room = 1.5 * (means[-1] - means[0]) or abs(means[0]) or 1.0
    low = max(min(point.low for point in bins), means[0] - room)
    high = min(max(point.high for point in bins), means[-1] + room)
    if log:
        return low / 1.05, high * 1.05
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_axis.ticks():
        parts.append(
            f'<text class="tick" x="{x_axis(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(value)}</text>'
        )
    return "".join(parts)


def _band(points: Sequence[_Bin], x_axis: _Axis, y_axis: _Axis, colour: int) -> str:
    if all(point.count == 1 for point in points):
        return ""
    clip = lambda y: min(max(y_axis(y), TOP), HEIGHT - BOTTOM)  # noqa: E731
    above = [f"{x_axis(point.x):.1f},{clip(point.high):.1f}" for point in points]
    below = [f"{x_axis(point.x):.1f},{clip(point.low):.1f}" for point in reversed(points)]
    return f'<polygon class="band c{colour % NUM_COLOURS}" points="{" ".join(above + below)}"/>'


def _path(points: Sequence[_Bin], x_axis: _Axis, y_axis: _Axis, colour: int) -> str:
    places = " ".join(f"{x_axis(point.x):.1f},{y_axis(point.mean):.1f}" for point in points)
    return f'<polyline class="line c{colour % NUM_COLOURS}" points="{places}"/>'


def _dot(label: str, point: _Bin, x_axis: _Axis, y_axis: _Axis, colour: int) -> str:
    """Tells the value where the mouse is; seen only where there are few."""
    spread = f" ({number(point.low)} to {number(point.high)} in {point.count} steps)" if point.count > 1 else ""
    tip = f"{label}, step {point.x:g}: {number(point.mean)}{spread}"
    place = f'cx="{x_axis(point.x):.1f}" cy="{y_axis(point.mean):.1f}"'
    return f'<circle class="dot c{colour % NUM_COLOURS}" {place} r="5"><title>{escape(tip)}</title></circle>'


def _legend(line: Line) -> str:
    return f'<span><i class="c{line.colour % NUM_COLOURS}"></i>{escape(line.label)}</span>'
