"""What tells a file from another one, or from itself before it was changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
_READ_BYTES = 1 << 22


def sample_hash(path: Path) -> str:
    """A hash of a file's size and of at most SAMPLES pieces of it, evenly spread, first and last among them: read in a
    fraction of a second whatever its size. It says that files differ, but hardly that a large one was not edited."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(SAMPLE_BYTES, -(-(size - SAMPLE_BYTES) // (SAMPLES - 1)))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of all bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
