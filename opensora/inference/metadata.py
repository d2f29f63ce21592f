"""What a sample's file says of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image

# Settings that say what else is drawn, where it goes and how the work is done, but not what one sample looks like.
NOT_OF_A_SAMPLE = (
    *("prompt", "ref", "neg", "dataset", "start_index", "end_index", "num_sample", "save_dir", "batch_size"),
    *("host", "port", "offload", "dist_timeout", "plugin", "plugin_config", "plugin_ae", "plugin_config_ae"),
)

# What damaged files of Pillow's and PyAV's raise.
UNREADABLE = (OSError, ValueError, SyntaxError, LookupError, av.error.FFmpegError)


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
    except (*UNREADABLE, TypeError):
        return None
    return comment if isinstance(comment, dict) else None


def has_tags(path: Path, tags: dict[str, str]) -> bool:
    """Whether `path` is a png with these tags."""
    try:
        with Image.open(path) as image:
            return {name: image.info.get(name) for name in tags} == tags
    except UNREADABLE:
        return False


def _plain(cfg) -> dict[str, Any]:
    return json.loads(json.dumps(cfg.to_dict(), default=str))
