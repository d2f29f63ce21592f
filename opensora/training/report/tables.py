"""What a report tells in tables: the runs, their buckets, their rejected samples, their settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from opensora.training.report.charts import number
from opensora.training.report.files import RunFiles, finite, throughput

REJECTED_SHOWN = 40
RECENT = 50  # updates whose mean is told as where a run is now


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right; strings are escaped here."""
    lines = ["".join(f"<th{_class(column)}>{escape(column.strip('#'))}</th>" for column in head)]
    for row in rows:
        cells = zip(head, row, strict=True)
        lines.append("".join(f"<td{_class(column)}>{escape(str(value))}</td>" for column, value in cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def _class(column: str) -> str:
    return ' class="number"' if column.endswith("#") else ' class="text"'


def overview(runs: Sequence[RunFiles]) -> str:
    """A row for each run: how far it is, how fast and how good."""
    head = ("run", "updates#", "epoch#", "samples#", "loss#", "evaluated loss#", "samples/s#", "tokens/s#", "hours#")
    return table(head, map(_overview_row, runs)) + (
        f'<p class="note">Loss and rates are means over the last {RECENT} updates; evaluations are not part of the '
        "rates. Hours are those of the updates that are told of, saving and evaluating included.</p>"
    )


def _overview_row(run: RunFiles) -> tuple[str, ...]:
    last = run.updates[-1]
    evaluated = run.evaluated("loss")
    return (
        run.name,
        f"{last['step']:,}",
        str(last["epoch"]),
        f"{sum(line['samples'] for line in run.updates):,}",
        _recent(run, "loss"),
        number(evaluated[-1][1]) if evaluated else "",
        _recent(run, "samples/s"),
        _recent(run, "tokens/s"),
        f"{sum(sum(line['seconds'].values()) for line in run.updates) / 3600:.2f}",
    )


def _recent(run: RunFiles, name: str) -> str:
    values = [value for _, value in run.series(name)[-RECENT:]]
    return number(sum(values) / len(values)) if values else ""


def buckets(run: RunFiles) -> str:
    """A row for each size of clips that rank 0 trained on; "" if the updates don't tell."""
    by_clip: dict[tuple, list[dict]] = defaultdict(list)
    for line in run.updates:
        if line.get("clip"):
            by_clip[tuple(line["clip"])].append(line)
    if not by_clip:
        return ""
    head = ("clips", "updates#", "of all#", "mean loss#", "seconds an update#", "samples/s#", "tokens/s#")
    return table(head, (_bucket_row(clip, by_clip[clip], len(run.updates)) for clip in sorted(by_clip)))


def _bucket_row(clip: tuple, lines: Sequence[dict], updates: int) -> tuple[str, ...]:
    frames, *size = clip
    losses = [loss for _, loss in finite((line["step"], line["loss"]) for line in lines)]
    rates = [[rate for line in lines if (rate := throughput(line, what)) is not None] for what in ("samples", "tokens")]
    seconds = [line["samples"] / rate for line in lines if (rate := throughput(line, "samples"))]
    return (
        f"{'image' if frames == 1 else f'{frames} frames'}, {' x '.join(map(str, size))} latents",
        f"{len(lines):,}",
        f"{len(lines) / updates:.1%}",
        *(number(sum(values) / len(values)) if values else "" for values in (losses, seconds, *rates)),
    )


def rejected(run: RunFiles) -> str:
    """How many samples could not be read and why; "" if all could."""
    if not run.rejected:
        return ""
    files = {line.get("path", "?"): line.get("reason", "?") for line in run.rejected}
    reasons = table(("reason", "files#"), Counter(files.values()).most_common(10))
    shown = list(files.items())[:REJECTED_SHOWN]
    rest = f", the first {len(shown)}" if len(shown) < len(files) else ""
    return (
        f"<p>{len(run.rejected):,} times a sample was replaced, {len(files):,} files in all.</p>{reasons}"
        f"<details><summary>the files{rest}</summary>{table(('file', 'reason'), shown)}</details>"
    )


def settings(runs: Sequence[RunFiles]) -> str:
    """All settings; of several runs, first those that are not the same."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = [(name, *(_shown(run.config, name) for run in runs)) for name in names]
    head = ("setting", *(run.name for run in runs))
    everything = f"<details><summary>all {len(rows)} settings</summary>{table(head, rows)}</details>"
    if len(runs) == 1:
        return everything
    different = [row for row in rows if len(set(row[1:])) > 1]
    return (table(head, different) if different else "<p>The runs have the same settings.</p>") + everything


def _shown(config: dict[str, Any], name: str) -> str:
    return str(config[name]) if name in config else "(not set)"
