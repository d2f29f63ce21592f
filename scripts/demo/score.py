"""Measure generated clips of shapes against their prompts.

    python scripts/demo/score.py samples/shapes [--train-metrics outputs/shapes/metrics.jsonl]
    python scripts/demo/score.py datasets/shapes.csv

Given a folder: every clip below it that has its prompt beside it (.txt, as inference.py writes) is scored, and the
folder gets score.json, prompts.csv, contact_sheet.png and, with --train-metrics, loss.png. Given a table (path, text):
its files are scored.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import contact_sheet, loss_curve
from measure import measure
from render import Subject, read_frames

MEDIA = (".mp4", ".png")
CHANCE = {"colour": 1 / 4, "direction": 1 / 4, "shape": 1 / 3}


class Scored(NamedTuple):
    """A file, its prompt, what the prompt asks for and what the file shows."""

    path: Path
    prompt: str
    asked: Subject
    shown: Subject

    def right(self, aspect: str) -> bool | None:
        """Whether the file shows what its prompt asks for; None if the prompt does not ask."""
        asked = getattr(self.asked, aspect)
        return None if asked is None else asked == getattr(self.shown, aspect)


def main() -> None:
    arguments = parse_arguments()
    target = Path(arguments.target)
    is_table = target.suffix == ".csv"
    prompts = prompts_of_table(target) if is_table else prompts_of_folder(target)
    scored = [score_file(path, prompt) for path, prompt in prompts.items() if Subject.of(prompt)]
    if not scored:
        raise SystemExit(f"{target}: no {' or '.join(MEDIA)} file with a prompt of the shapes beside it (.txt)")
    fractions = {aspect: fraction(scored, aspect) for aspect in CHANCE}
    print_table(scored, fractions)
    if not is_table:
        write_results(target, scored, fractions)
        if arguments.train_metrics:
            loss_curve(Path(arguments.train_metrics), target / "loss.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a folder of samples, or a table with the columns path and text")
    parser.add_argument("--train-metrics", help="metrics.jsonl of the run, for loss.png")
    return parser.parse_args()


def prompts_of_folder(folder: Path) -> dict[Path, str]:
    """Files of samples below `folder` -> their prompts."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in MEDIA)
    sidecars = {path: path.with_suffix(".txt") for path in files}
    return {path: text.read_text(encoding="utf-8").strip() for path, text in sidecars.items() if text.exists()}


def prompts_of_table(table: Path) -> dict[Path, str]:
    with table.open(newline="", encoding="utf-8") as file:
        return {Path(row["path"]): row["text"] for row in csv.DictReader(file)}


def score_file(path: Path, prompt: str) -> Scored:
    return Scored(path, prompt, Subject.of(prompt), measure(read_frames(path)))


def fraction(scored: list[Scored], aspect: str) -> float:
    """Of the files whose prompts ask for `aspect`, those that show it; 0 if none asks."""
    answers = [s.right(aspect) for s in scored if s.right(aspect) is not None]
    return float(np.mean(answers)) if answers else 0.0


def print_table(scored: list[Scored], fractions: dict[str, float]) -> None:
    wrong = [s for s in scored if not all(s.right(aspect) is not False for aspect in CHANCE)]
    for s in wrong[:48]:
        print(f"{s.path.name:40} asked: {s.asked.prompt:32} shown: {s.shown.prompt}")
    print(f"\n{'':12}{'right':>8}{'chance':>8}   of {len(scored)} files")
    for aspect, value in fractions.items():
        print(f"{aspect:12}{value:8.1%}{CHANCE[aspect]:8.1%}")


def write_results(folder: Path, scored: list[Scored], fractions: dict[str, float]) -> None:
    (folder / "score.json").write_text(json.dumps(fractions, indent=2) + "\n")
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "prompt"))
        writer.writerows((s.path.relative_to(folder).as_posix(), s.asked.prompt) for s in scored)
    cells = [(s.asked.prompt, all(s.right(a) is not False for a in CHANCE), read_frames(s.path)) for s in scored]
    contact_sheet(cells[:48], folder / "contact_sheet.png")
    print(f"\nwritten in {folder}: score.json, prompts.csv, contact_sheet.png")


if __name__ == "__main__":
    main()
