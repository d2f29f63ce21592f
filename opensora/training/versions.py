"""What a run runs on: the versions of what its numbers depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("opensora", "torch", "colossalai")


def versions() -> dict[str, str | None]:
    """Versions of packages and Python, and the commit where the code is a git checkout ("-dirty" if it was edited)."""
    found = {package: _installed(package) for package in PACKAGES}
    return {**found, "python": platform.python_version(), "commit": _commit(Path(__file__).parents[2])}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
