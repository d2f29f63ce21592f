"""Whether a sample that is there is the one that is asked for, by what its file says of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from opensora.inference.image_first import FOLDER as FIRST_FRAMES
from opensora.inference.refine import DYNAMIC

# What comes of these settings is among the facts.
SAID_BY_FACTS = ("seed", "sampling_option.seed", "model.from_pretrained", "cond_type", "lora")
# How the work is done.
WITHOUT_EFFECT = (".compile", ".shardformer", "ae_spatial_compression")
OF_VIDEOS = ("fps_save", "crf", "motion_score")
OF_REFERENCES = ("sampling_option.guidance_img", "sampling_option.image_osci", "sampling_option.scale_temporal_osci")
SHOWN = 60  # characters of a value


def first_difference(found: Mapping[str, Any], asked: Mapping[str, Any], is_image: bool) -> str | None:
    """The first of what two comments (`metadata.sample_tags`) both say that they say differently; None: nothing.

    What one of them leaves out does not count: it may be of an earlier version, with other settings.
    """
    here, there = (_what_counts(comment, is_image) for comment in (found, asked))
    for name in there:
        if name in here and here[name] != there[name]:
            return f"{name} is {', not '.join(_shown(here[name], there[name]))}"
    return None


def _what_counts(comment: Mapping[str, Any], is_image: bool) -> dict[str, Any]:
    """What a sample depends on: facts, then settings by their dotted names, then the text that comes of both."""
    facts = {name: value for name, value in comment.items() if name not in ("config", "text")}
    settings = dict(_dotted(comment.get("config") or {}))
    for name in list(settings):
        if name in SAID_BY_FACTS or name.endswith(WITHOUT_EFFECT) or not _has_effect(name, facts, settings, is_image):
            del settings[name]
    text = {} if _asks_a_language_model(settings) else {"text": comment.get("text")}
    found = {**facts, **settings, **text}
    return {name: _comparable(name, value) for name, value in found.items()}


def _has_effect(name: str, facts: Mapping[str, Any], settings: Mapping[str, Any], is_image: bool) -> bool:
    if name in OF_VIDEOS:
        return not is_image
    if name in OF_REFERENCES:
        return facts.get("condition") != "t2v"
    if name == "refine_model":
        return _asks_a_language_model(settings)
    if name == "lora_scale":
        return facts.get("lora") is not None
    return not name.startswith("img_") or bool(settings.get("use_t2i2v"))


def _asks_a_language_model(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("refine_prompt")) or settings.get("motion_score") == DYNAMIC


def _comparable(name: str, value: Any) -> Any:
    """Paths from the root, and numbers that a command line may give as texts."""
    if name == "references" and isinstance(value, list):
        return [_place(path) for path in value]
    if isinstance(value, str) and (name in ("weights", "lora") or name.endswith("from_pretrained")):
        return _place(value)
    return str(value) if name == "motion_score" else value


def _place(path: str) -> str:
    parts = PurePath(path).parts
    drawn = parts[-2:-1] == (FIRST_FRAMES,)  # wherever the samples' folder is now
    return "/".join(parts[-2:]) if drawn else os.path.abspath(path)


def _dotted(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown(*values: Any) -> list[str]:
    """Both values, of long ones the part where they begin to differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    start = max(0, same - SHOWN // 3)
    return [
        ("..." if start else "") + text[start : start + SHOWN] + ("..." if len(text) > start + SHOWN else "")
        for text in texts
    ]
