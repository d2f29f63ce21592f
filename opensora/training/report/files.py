"""What a run left in its folder, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.training.run_folder import EVALUATIONS_FILE, METRICS_FILE, REJECTED_FILE

CONFIG_FILE = "config.txt"


@dataclass(frozen=True)
class RunFiles:
    """A run.

    Attributes:
        name: of its folder.
        updates, evaluations, rejected: the objects of metrics.jsonl, eval.jsonl and rejected.jsonl.
        config: settings by dotted name.
    """

    name: str
    folder: Path
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """
        Raises:
            FileNotFoundError: this is no run folder, or no update is done yet.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder; give a run folder, e.g. outputs/EXP")
        updates = [line for line in _read_lines(folder / METRICS_FILE) if "step" in line]
        if not updates:
            raise FileNotFoundError(f"{folder} has no {METRICS_FILE} with an update in it: give a run folder")
        return cls(
            folder.resolve().name,
            folder,
            updates,
            [line for line in _read_lines(folder / EVALUATIONS_FILE) if "step" in line],
            _read_lines(folder / REJECTED_FILE),
            _read_config(folder / CONFIG_FILE),
        )

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a number that updates have; "samples/s" and "tokens/s" too."""
        if name.endswith("/s"):
            values = ((line["step"], throughput(line, name.removesuffix("/s"))) for line in self.updates)
        else:
            values = ((line["step"], line.get(name)) for line in self.updates)
        return finite(values)

    def evaluated(self, *keys: str) -> list[tuple[int, float]]:
        """(step, value) of a number that evaluations have, by the keys that lead to it."""
        return finite((line["step"], _lookup(line, keys)) for line in self.evaluations)

    def names(self, key: str) -> list[str]:
        """The names under `key` in any evaluation, in the order in which they come."""
        return list(dict.fromkeys(name for line in self.evaluations for name in line.get(key, {})))


def throughput(update: Mapping[str, Any], what: str) -> float | None:
    """`what` a second in an update, the time of evaluations left out."""
    seconds = sum(value for phase, value in update["seconds"].items() if phase != "eval")
    return update[what] / seconds if seconds > 0 else None


def finite(points) -> list[tuple[int, float]]:
    return [(step, float(value)) for step, value in points if value is not None and math.isfinite(value)]


def _lookup(line: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        line = line.get(key, {})
    return line if isinstance(line, (int, float)) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. A line that is being written is left out."""
    if not path.is_file():
        return []
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
