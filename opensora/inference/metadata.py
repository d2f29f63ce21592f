"""What a sample's file says of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

# Settings that say what else is drawn, where it goes and how the work is done, but not what one sample looks like.
NOT_OF_A_SAMPLE = (
    *("prompt", "ref", "neg", "dataset", "start_index", "end_index", "num_sample", "save_dir", "batch_size"),
    *("host", "port", "offload", "dist_timeout", "plugin", "plugin_config", "plugin_ae", "plugin_config_ae"),
)


def sample_tags(prompt: str, facts: dict[str, Any], cfg) -> dict[str, str]:
    """ "title" is the prompt; "comment" is JSON: the prompt, `facts`, and the settings that the sample depends on."""
    settings = {key: value for key, value in _plain(cfg).items() if key not in NOT_OF_A_SAMPLE}
    comment = {"prompt": prompt, **facts, "config": settings}
    return {"title": prompt, "comment": json.dumps(comment, ensure_ascii=False)}


def has_tags(path: Path, tags: dict[str, str]) -> bool:
    """Whether `path` is a png with these tags."""
    try:
        with Image.open(path) as image:
            return {name: image.info.get(name) for name in tags} == tags
    except OSError:
        return False


def _plain(cfg) -> dict[str, Any]:
    return json.loads(json.dumps(cfg.to_dict(), default=str))
