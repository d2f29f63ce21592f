"""Whether weights fit a model: what is missing, left over or of another shape, and how to say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Misfit:
    """Names of weights: those that the model lacks a value for, those it has no use for, those of another shape."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    @classmethod
    def between(cls, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> Misfit:
        """From the shapes by name that a model has, and those that there are."""
        return cls(
            missing=[name for name in expected if name not in given],
            unexpected=[name for name in given if name not in expected],
            misshaped=[
                f"{name} {list(given[name])} instead of {list(expected[name])}"
                for name in expected
                if name in given and given[name] != expected[name]
            ],
        )

    def __str__(self) -> str:
        """'2 missing (a, b), 1 mis-shaped (c [2] instead of [3])'; empty where nothing is wrong."""
        wrong = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.misshaped}
        return ", ".join(f"{len(names)} {kind} ({first_names(names)})" for kind, names in wrong.items() if names)


def first_names(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
