"""What a sample's file says of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import av
from PIL import Image

# Settings that say what else is drawn, where it goes and how the work is done, but not what one sample looks like.
NOT_OF_A_SAMPLE = (
    *("prompt", "ref", "neg", "dataset", "start_index", "end_index", "num_sample", "save_dir", "batch_size"),
    *("host", "port", "offload", "dist_timeout", "plugin", "plugin_config", "plugin_ae", "plugin_config_ae"),
)
# Settings that can say the same in other ways: the facts have what comes of them.
SAID_BY_FACTS = {"sampling_option.seed", "model.from_pretrained", "cond_type", "motion_score"}


def sample_tags(prompt: str, facts: dict[str, Any], cfg) -> dict[str, str]:
    """ "title" is the prompt; "comment" is JSON: the prompt, `facts`, and the settings that the sample depends on."""
    settings = {key: value for key, value in _plain(cfg).items() if key not in NOT_OF_A_SAMPLE}
    comment = {"prompt": prompt, **facts, "config": settings}
    return {"title": prompt, "comment": json.dumps(comment, ensure_ascii=False)}


def read_comment(path: Path) -> dict[str, Any] | None:
    """What `sample_tags` said in the comment of a png or mp4; None for a file that has none, or can't be read."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                comment = json.loads(image.info["comment"])
        else:
            with av.open(str(path)) as container:
                comment = json.loads(container.metadata["comment"])
    except (OSError, ValueError, KeyError, TypeError):  # PyAV's errors are of the first two kinds
        return None
    return comment if isinstance(comment, dict) else None


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any], unknown: Set[str]) -> str | None:
    """The first of what two comments both say that they say differently, but for what is `unknown`.

    What one of them leaves out does not count: it may be of an earlier version, with other settings.
    """
    here, there = _flat(found), _flat(expected)
    for name in there:
        if name in here and name not in unknown | SAID_BY_FACTS and here[name] != there[name]:
            return f"{name} is {_short(here[name])}, not {_short(there[name])}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _flat(comment: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, as they are given on the command line, after the facts."""
    facts = {name: value for name, value in comment.items() if name != "config"}
    settings = dict(_dotted(comment.get("config") or {}))
    return facts | {name: value for name, value in settings.items() if name not in facts}


def _dotted(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def has_tags(path: Path, tags: dict[str, str]) -> bool:
    """Whether `path` is a png with these tags."""
    try:
        with Image.open(path) as image:
            return {name: image.info.get(name) for name in tags} == tags
    except OSError:
        return False


def _plain(cfg) -> dict[str, Any]:
    return json.loads(json.dumps(cfg.to_dict(), default=str))
