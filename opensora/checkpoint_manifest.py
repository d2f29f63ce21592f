"""manifest.json of a checkpoint: the size and the checksums of every file, and what wrote it.

    {"format": 1, "chunk_bytes": 67108864, "files": {"model/model-00001.safetensors": {"bytes": N, "crc32": ["..."]}},
     "versions": {...}, "layout": {...}}

`crc32` is of each `chunk_bytes` of a file, the last one shorter (zlib's CRC-32, 8 hexadecimal digits).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
CHUNK_BYTES = 2**26
_FORMAT = 1
_THREADS = 8
_WEIGHTS = ("model/", "lora/", "ema/")  # what is read of a checkpoint by who wants its weights alone


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes, and the checksum of each chunk of it."""

    nbytes: int
    crc32: tuple[str, ...]


def checksum(chunk: bytes | memoryview) -> str:
    return f"{zlib.crc32(chunk):08x}"


def format_manifest(files: Mapping[str, FileRecord], facts: Mapping[str, Any]) -> str:
    """The text of a manifest; `facts` are kept beside the files."""
    entries = {name: {"bytes": files[name].nbytes, "crc32": files[name].crc32} for name in sorted(files)}
    return json.dumps({"format": _FORMAT, "chunk_bytes": CHUNK_BYTES, **facts, "files": entries}, indent=1)


def weight_problems(checkpoint: Path) -> list[str]:
    """What is wrong with the sizes of a checkpoint's weights; parts that were taken out as a whole are not missed."""
    try:
        files = _read(checkpoint)[0]
    except ValueError as error:
        return [str(error)]
    wanted = [name for name in files if name.startswith(_WEIGHTS) and (checkpoint / name).parent.is_dir()]
    return size_problems(checkpoint, {name: files[name] for name in wanted})


def problems(checkpoint: Path, checksums: bool = True) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; nothing is known of one without a manifest.

    Args:
        checksums: read all files. Otherwise only their sizes are compared.
    """
    try:
        files, chunk_bytes = _read(checkpoint)
    except ValueError as error:
        return [str(error)]
    found = size_problems(checkpoint, files)
    return found or (differences(checkpoint, files, chunk_bytes) if checksums else [])


def summary(found: list[str]) -> str:
    """Problems in one line."""
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def has_manifest(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _read(checkpoint: Path) -> tuple[dict[str, FileRecord], int]:
    """(records of the files, bytes of a chunk); no files without a manifest."""
    if not has_manifest(checkpoint):
        return {}, CHUNK_BYTES
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: FileRecord(entry["bytes"], tuple(entry["crc32"])) for name, entry in manifest["files"].items()}
        chunk_bytes = manifest["chunk_bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    return files, chunk_bytes


def size_problems(checkpoint: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """The files that are missing or of another size than recorded, a line each."""
    found = []
    for name, record in files.items():
        try:
            size = os.stat(checkpoint / name).st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if size != record.nbytes:
            found.append(f"{name} has {size} bytes of {record.nbytes}")
    return found


def differences(folder: Path, files: Mapping[str, FileRecord], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """The files in `folder` whose bytes are not those of their checksums, a line each."""
    chunks = [(name, index) for name, record in files.items() for index in range(len(record.crc32))]

    def check(chunk: tuple[str, int]) -> str | None:
        name, index = chunk
        try:
            with open(folder / name, "rb", buffering=0) as file:
                file.seek(index * chunk_bytes)
                matches = checksum(_read_fully(file, chunk_bytes)) == files[name].crc32[index]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if matches else f"{name} is corrupt"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        return list(dict.fromkeys(filter(None, threads.map(check, chunks))))


def _read_fully(file: BinaryIO, nbytes: int) -> bytes:
    """`nbytes` of an unbuffered file, fewer at its end: one read may give less, over a network for one."""
    data = file.read(nbytes)
    while len(data) < nbytes and (more := file.read(nbytes - len(data))):
        data += more
    return data
