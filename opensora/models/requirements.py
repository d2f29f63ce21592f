"""What a model's settings need of the machine beside torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opensora.models.attention import why_not_attention
from opensora.models.compilation import why_not_compile


def missing_requirements(settings: Mapping[str, Any], dtype: torch.dtype, where: str = "model") -> list[str]:
    """What the settings of a config's section `where` ask for that can't be had here, and what to do about each."""
    has_cuda = torch.cuda.is_available()  # then the device is a CUDA device
    head_dim = sum(settings["axes_dim"])
    found = [why_not_attention(settings.get("attention", "sdpa"), head_dim, dtype, has_cuda, where)]
    if settings.get("compile"):
        lacking = why_not_compile(has_cuda)
        found.append(lacking and f"{where}.compile=True needs {lacking}, or set --{where}.compile False")
    return [reason for reason in found if reason]
