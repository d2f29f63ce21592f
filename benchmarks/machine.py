"""What a figure was measured on: the last part of the JSON that each script of this folder prints."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str, device: str = "cpu") -> dict[str, object]:
    """What to add to a result.

    packages: those whose versions matter, beside Python's. device: "cuda" names the GPU too.
    """
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    gpu = {}
    if device == "cuda":
        import torch  # scripts that measure memory do without

        gpu = {"device": torch.cuda.get_device_name()}
    return {
        "processor": platform.processor() or platform.machine(),
        **gpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
    }
