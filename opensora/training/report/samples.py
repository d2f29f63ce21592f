"""The samples of a run's evaluations as a table: a row for each prompt, a column for each step."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from opensora.training.report.files import RunFiles

MAX_COLUMNS, MAX_ROWS = 8, 24
# A file is put into the page if it is small, as long as the page does not get too large; others are linked to.
EMBEDDED_BYTES, PAGE_BYTES = 256 * 2**10, 24 * 2**20
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}


class Embedder:
    """Sources for a page at `page`: data, or a path that is relative to it."""

    def __init__(self, page: Path):
        self._folder, self._left = page.resolve().parent, PAGE_BYTES

    def source(self, path: Path) -> str:
        size = path.stat().st_size
        if size > min(EMBEDDED_BYTES, self._left):
            return quote(Path(relpath(path.resolve(), self._folder)).as_posix())
        self._left -= size
        return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def sample_table(run: RunFiles, embedder: Embedder) -> str:
    """ "" if no evaluation drew samples."""
    drawn = [evaluation for evaluation in run.evaluations if evaluation.get("samples")]
    if not drawn:
        return ""
    shown = spread(drawn, MAX_COLUMNS)
    files = {e["step"]: {_key(sample): sample["file"] for sample in e["samples"]} for e in shown}
    keys = list(dict.fromkeys(key for of_step in files.values() for key in of_step))
    head = "".join(f"<th>step {step:,}</th>" for step in files)
    rows = "".join(
        f'<tr><th class="prompt">{escape(prompt)}</th>'
        + "".join(
            f"<td>{_media(run.folder, of_step.get((name, prompt)), prompt, embedder)}</td>"
            for of_step in files.values()
        )
        + "</tr>"
        for name, prompt in keys[:MAX_ROWS]
    )
    left_out = f", {len(shown)} of {len(drawn)} evaluations" if len(shown) < len(drawn) else ""
    left_out += f", {MAX_ROWS} of {len(keys)} prompts" if len(keys) > MAX_ROWS else ""
    weights = "averaged weights" if drawn[-1].get("averaged") else "weights as they were"
    return (
        f'<h3>{escape(run.name)} <span class="note">{weights}{left_out}</span></h3>'
        f'<div class="wide"><table class="samples"><tr><th></th>{head}</tr>{rows}</table></div>'
    )


def _key(sample: dict) -> tuple[str, str]:
    """The row of a sample: a list may have a prompt twice, and a resumed run another list."""
    return Path(sample["file"]).stem, sample["prompt"]


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _media(folder: Path, file: str | None, prompt: str, embedder: Embedder) -> str:
    if file is None or Path(file).suffix not in MEDIA_TYPES:
        return ""
    path = folder / file
    if not path.is_file():
        return '<span class="note">no longer there</span>'
    source, label = embedder.source(path), escape(prompt)
    if path.suffix == ".png":
        return f'<img src="{source}" alt="{label}">'
    return f'<video src="{source}" aria-label="{label}" autoplay loop muted playsinline controls></video>'
