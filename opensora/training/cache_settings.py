"""What can be set for `scripts/cnv/cache.py`: a training run's settings, and where and what to cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.schema import setting
from opensora.settings import check_at_least
from opensora.training.settings import TrainSettings


@dataclass(kw_only=True)
class CacheSettings(TrainSettings):
    """Settings of a training run, and of the cache for it."""

    output: str = setting(doc="folder of the cache")
    windows: int = setting(1, "windows of each video to cache; a run draws one of them each epoch")
    encode_video: bool = setting(True, "cache latents, for --cached-video")
    encode_text: bool = setting(True, "cache text embeddings, for --cached-text")


def validate_cache(cfg: Mapping[str, Any]) -> None:
    """The rules among the settings that a training run has not."""
    check_at_least(cfg, {"windows": 1})
    if not cfg["encode_video"] and not cfg["encode_text"]:
        raise ValueError("encode_video=False and encode_text=False: there is nothing to cache")
    for name in ("cached_video", "cached_text"):
        if cfg[name] is not None:
            raise ValueError(f"{name}='{cfg[name]}' is for training: here, --output is the folder of the cache")
