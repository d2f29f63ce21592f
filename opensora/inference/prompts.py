"""What to sample: prompts from the command line or a file, with references, negative prompts and names."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora.common import get_logger
from opensora.registry import DATASETS

COLUMNS = ("text", "ref", "neg", "name")
CONTACT_SHEET = "contact_sheet"  # of all samples, beside them
LONGEST_NAME = 240  # bytes: file systems take 255, with the sample's number and ending


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt list.

    Attributes:
        index: its place in the whole list, which seeds and names follow.
        text, negative: as the user wrote them.
        references: paths of images or videos, in order of time.
        name: the stem of its files.
        refined: the text as a language model rewrote it. motion: its motion score, where that is the prompt's own.
    """

    index: int
    text: str
    negative: str
    references: tuple[str, ...]
    name: str
    refined: str | None = None
    motion: str | None = None

    @property
    def description(self) -> str:
        """What is drawn."""
        return self.text if self.refined is None else self.refined

    def file_stem(self, sample: int, num_sample: int) -> str:
        """`name`, with the sample's number where a prompt has several."""
        return f"{self.name}_{sample}" if num_sample > 1 else self.name


def prompts_from_texts(texts: str | Sequence[str], refs: str | Sequence[str] | None, negative: str) -> list[Prompt]:
    """Prompts given in the config or on the command line; commas, quotes and newlines are part of them.

    refs: "first.png;last.png" for all prompts, or a list with one such entry a prompt.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompt {i} (from 0) of {len(texts)} is empty: say what to show")
        check_text(f"prompt {i} (from 0) of {len(texts)}", text)
    refs = [refs] * len(texts) if refs is None or isinstance(refs, str) else list(refs)
    if len(refs) != len(texts):
        raise ValueError(f"ref has {len(refs)} entries for {len(texts)} prompts: give one for all, or one each")
    return [
        Prompt(i, text, negative, split_references(ref), f"prompt_{i:04d}")
        for i, (text, ref) in enumerate(zip(texts, refs, strict=True))
    ]


@DATASETS.register("text")
class PromptFile:
    """A csv file with a column text and, if wanted, ref, neg, name; or a txt file with one prompt a line.

    Args:
        data_path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file given, or neither csv nor txt.
    """

    def __init__(self, data_path: str | None = None):
        if data_path is None:
            raise ValueError('there is no prompt: give --prompt "raining, sea" or --dataset.data-path prompts.csv')
        self.path = Path(data_path)
        if not self.path.is_file():
            raise FileNotFoundError(f"dataset.data_path={data_path}: there is no such file")
        if self.path.suffix not in (".csv", ".txt"):
            raise ValueError(f"dataset.data_path={data_path}: prompts are read from .csv or .txt")

    def prompts(self, ref: str | None, negative: str) -> list[Prompt]:
        """All rows. ref and negative stand in where a row has none of its own; relative references are looked for
        from the working directory, then beside the file.

        Raises:
            ValueError: no column text, a row without one or with more fields than columns, not UTF-8, a name twice or
                one that is no file name.
        """
        if ref is not None and not isinstance(ref, str):
            raise ValueError(f"ref has {len(ref)} entries: for prompts of a file, give one for all or a column 'ref'")
        rows = _csv_rows(self.path) if self.path.suffix == ".csv" else _txt_rows(self.path)
        prompts = []
        for i, row in enumerate(rows):
            references = (_beside(self.path, part) for part in split_references(row.get("ref") or ref))
            name = row.get("name") or f"{self.path.stem}_{i:04d}"
            prompts.append(Prompt(i, row["text"], row.get("neg") or negative, tuple(references), name))
        _check_names(self.path, prompts)
        return prompts


def check_text(what: str, text: str) -> None:
    """ValueError for a text that is none: a command line in another encoding leaves marks in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not text in UTF-8 ({text!a}, at {error.start}): check the terminal's encoding"
        ) from None


def split_references(ref: str | None) -> tuple[str, ...]:
    """ "a.png;b.png" -> ("a.png", "b.png")"""
    return tuple(part.strip() for part in (ref or "").split(";") if part.strip())


def add_fps(text: str, fps: float) -> str:
    """`text` as a sentence, then the frame rate, as captions have it in training; not twice. (spec 10)"""
    text = text.strip()
    if not text.endswith("."):
        text += "."
    return text if text.endswith(f"{fps} FPS.") else f"{text} {fps} FPS."


def add_motion_score(text: str, score: str | float) -> str:
    """`text` and how much should move: 1 is little, 7 is much. (spec 10)"""
    return f"{text} {score} motion score."


def _csv_rows(path: Path) -> Iterable[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if "text" not in (reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames) or "none"
                raise ValueError(f"dataset.data_path={path}: it needs a column 'text' (columns found: {found})")
            if others := [name for name in reader.fieldnames if name and name not in COLUMNS]:
                get_logger().info(f"{path}: of its columns {', '.join(others)} are not used, {', '.join(COLUMNS)} are")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"dataset.data_path={path}: not a csv file in UTF-8 ({error})") from error
    for i, row in enumerate(rows):
        if None in row:  # where csv puts the fields that no column is named for
            raise ValueError(
                f"dataset.data_path={path}: row {i} (from 0) has more fields than the header: put texts that have "
                'commas in double quotes ("raining, sea")'
            )
        if not (row["text"] or "").strip():
            raise ValueError(f"dataset.data_path={path}: row {i} (from 0) has no text: fill it in, or take the row out")
    return rows


def _txt_rows(path: Path) -> Iterable[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also cuts where a prompt has U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset.data_path={path}: not text in UTF-8 ({error})") from error
    return [{"text": line.strip()} for line in lines if line.strip()]


def _beside(path: Path, reference: str) -> str:
    beside = path.parent / reference
    return str(beside) if not Path(reference).exists() and beside.exists() else reference


def _check_names(path: Path, prompts: Sequence[Prompt]) -> None:
    for name, count in Counter(prompt.name for prompt in prompts).items():
        if count > 1:
            raise ValueError(f"dataset.data_path={path}: {count} rows are named '{name}': names are file names")
        if Path(name).name != name or name.startswith(".") or "\0" in name:
            raise ValueError(f"dataset.data_path={path}: the name '{name}' cannot be a file name")
        if name.startswith(CONTACT_SHEET):
            raise ValueError(f"dataset.data_path={path}: '{name}' is kept for the contact sheet: name it otherwise")
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise ValueError(
                f"dataset.data_path={path}: the name '{name[:20]}...' has {len(os.fsencode(name))} bytes: at most "
                f"{LONGEST_NAME}"
            )
