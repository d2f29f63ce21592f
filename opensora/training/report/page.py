"""One or several runs as a page that needs nothing but itself: no script, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from opensora.durable import write_whole
from opensora.training.report import tables
from opensora.training.report.charts import NUM_COLOURS, Line, line_chart, stacked_bars
from opensora.training.report.files import RunFiles
from opensora.training.report.samples import Embedder, sample_table, spread

STYLE = Path(__file__).with_name("style.css")


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Read the runs in `folders` and write the page.

    Raises:
        FileNotFoundError: a folder is not that of a run that has begun.
        ValueError: the page can't be written.
    """
    runs = [RunFiles.read(folder) for folder in folders]
    html = render(runs, Embedder(page), datetime.now())
    try:
        write_whole(page, html)
    except OSError as error:
        raise ValueError(f"{page} cannot be written ({error.strerror}): give another place, --output FILE") from error


def render(runs: Sequence[RunFiles], embedder: Embedder, now: datetime) -> str:
    """The page's HTML."""
    title = " and ".join(run.name for run in runs)
    body = "".join(
        [
            f'<h1>{escape(title)}</h1><p class="note">as of {now:%Y-%m-%d %H:%M}</p>',
            tables.overview(runs),
            _section("Training", _charts(_training_charts(runs))),
            _section("Evaluation", _charts(_evaluation_charts(runs))),
            _section("Samples over time", "".join(sample_table(run, embedder) for run in runs)),
            _section("Buckets", _of_each(runs, tables.buckets)),
            _section("Samples that could not be read", _of_each(runs, tables.rejected)),
            _section("Settings", tables.settings(runs)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _charts(charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _of_each(runs: Sequence[RunFiles], content_of) -> str:
    contents = [(run, content_of(run)) for run in runs]
    named = len(runs) > 1
    return "".join((f"<h3>{escape(run.name)}</h3>" if named else "") + content for run, content in contents if content)


def _training_charts(runs: Sequence[RunFiles]) -> list[str]:
    def chart(title: str, name: str, log: bool = False) -> str:
        return line_chart(title, [Line(run.name, run.series(name), i) for i, run in enumerate(runs)], log)

    skipped = any(value for run in runs for _, value in run.series("skipped"))
    return [
        chart("Loss", "loss", log=True),
        chart("Gradient norm before clipping", "grad_norm", log=True),
        chart("Learning rate", "lr"),
        chart("Samples a second", "samples/s"),
        chart("Tokens a second", "tokens/s"),
        stacked_bars("Seconds of an update, on average", [(run.name, _mean_seconds(run)) for run in runs], "s"),
        chart("Updates skipped so far", "skipped") if skipped else "",
    ]


def _evaluation_charts(runs: Sequence[RunFiles]) -> list[str]:
    overall = line_chart("Loss of held-out samples", [Line(r.name, r.evaluated("loss"), i) for i, r in enumerate(runs)])
    return [overall, *(_parts(run, len(runs) > 1, *part) for run in runs for part in EVALUATION_PARTS)]


EVALUATION_PARTS = (("by clip", "by_clip", ""), ("by time", "by_time", "t = "))


def _parts(run: RunFiles, named: bool, title: str, key: str, prefix: str) -> str:
    """A chart with a line for each part of a run's evaluated loss; "" if there is only one, which is the whole."""
    names = sorted(run.names(key), key=_in_order)
    if len(names) < 2:
        return ""
    shown = spread(names, NUM_COLOURS)
    lines = [Line(prefix + name, run.evaluated(key, name), i) for i, name in enumerate(shown)]
    left_out = f", {len(shown)} of {len(names)}" if len(shown) < len(names) else ""
    return line_chart(f"The same {title}{left_out}" + (f", {run.name}" if named else ""), lines)


def _in_order(name: str) -> list[float]:
    """By the numbers in it: 256px/5 before 256px/33."""
    return [float(number) for number in re.findall(r"[\d.]+", name)]


def _mean_seconds(run: RunFiles) -> dict[str, float]:
    phases = dict.fromkeys(phase for line in run.updates for phase in line["seconds"])
    return {phase: sum(line["seconds"].get(phase, 0.0) for line in run.updates) / len(run.updates) for phase in phases}
