"""What the frozen encoders make of a table, in a folder: written once, looked up while training.

FOLDER/cache.json                  what it was made with and for, the names of the shards and of the index
FOLDER/index-*.npy                 int64 [3, N]: the two halves of each key, the first sorted; and where the entry is
FOLDER/shards/*.safetensors        "keys" int64 [n, 2], and the tensors of n entries of one shape, stacked

An entry's key is a hash of all that it is of (a caption; a file and a window of it), not its row: a table may be
shuffled, cut or extended, and what is changed in it is not found. Files are written under another name and renamed;
shards are never changed; cache.json names an index only when all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from fcntl import LOCK_EX, LOCK_NB, lockf
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
SHARD_BYTES = 256 << 20
_KEYS = "keys"
_REJECTED = -1  # in place of where an entry is: its file could not be read
_OPEN_SHARDS = 64


class Key(NamedTuple):
    """128 bits, as two signed integers."""

    high: int
    low: int


class NotCachedError(ValueError):
    """An entry that the cache should have and has not: the table is not the one that it was made for."""


def entry_key(*parts: str | int) -> Key:
    """The key of an entry that is known by `parts`."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return Key(*np.frombuffer(digest, "<i8").tolist())


def text_key(caption: str) -> Key:
    """The key of a caption's embeddings."""
    return entry_key("text", caption)


class _KeyIndex:
    """Where keys are, by the sorted first halves [N] and the second halves [N]."""

    def __init__(self, highs: NDArray[np.int64], lows: NDArray[np.int64]):
        self.highs, self.lows = highs, lows

    def find(self, key: Key) -> int | None:
        at = int(np.searchsorted(self.highs, key.high))
        while at < len(self.highs) and self.highs[at] == key.high:
            if self.lows[at] == key.low:
                return at
            at += 1
        return None


class StoredKeys:
    """The keys of all entries that are in the shards of a folder, indexed or not."""

    def __init__(self, folder: Path):
        shards = [shard_keys(folder, name) for name in shard_names(folder)]
        keys = np.concatenate([*shards, np.empty((0, 2), dtype=np.int64)])
        self._keys = _KeyIndex(*keys[np.argsort(keys[:, 0])].T.copy())

    def __contains__(self, key: Key) -> bool:
        return self._keys.find(key) is not None


class ShardWriter:
    """Writes entries into the shards of a folder; entries of one shape should follow each other."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder, self._shard_bytes = folder / "shards", shard_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keys: list[Key] = []
        self._entries: list[Mapping[str, Tensor]] = []
        self._bytes = 0

    def add(self, key: Key, entry: Mapping[str, Tensor]) -> None:
        if self._entries and _layout(entry) != _layout(self._entries[0]):
            self.flush()
        self._keys.append(key)
        self._entries.append({name: tensor.detach().cpu() for name, tensor in entry.items()})
        self._bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._entries:
            return
        tensors = {name: torch.stack([entry[name] for entry in self._entries]) for name in self._entries[0]}
        tensors[_KEYS] = torch.tensor(self._keys, dtype=torch.int64)  # [n, 2]
        name = f"{hashlib.sha256(tensors[_KEYS].numpy()).hexdigest()[:32]}.safetensors"  # equal only if all keys are
        temporary = self._folder / f".{name}.{os.getpid()}"
        temporary.touch()
        mode = temporary.stat().st_mode  # a file like any other: save_file's own are for their owner alone
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(f"'{self._folder}': {error}: make room on its disk, then start again") from error
        temporary.chmod(mode)
        _put_in_place(temporary, self._folder / name)
        self._keys, self._entries, self._bytes = [], [], 0


def _layout(entry: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in entry.items()}


def _put_in_place(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "shards").glob("[!.]*.safetensors"))


def shard_keys(folder: Path, name: str) -> NDArray[np.int64]:
    """[n, 2]"""
    with safe_open(folder / "shards" / name, "pt") as shard:
        return shard.get_tensor(_KEYS).numpy()


def read_description(folder: Path) -> dict[str, Any] | None:
    """What cache.json says, None where there is none."""
    try:
        return json.loads((folder / "cache.json").read_text())
    except FileNotFoundError:
        return None


def lock(folder: Path) -> TextIO:
    """Hold `folder` for one run: until the file that is returned is closed, or the process ends.

    Raises:
        ValueError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / ".lock").open("w")
    try:
        lockf(held, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        held.close()
        raise ValueError(f"'{folder}' is being written by another run of scripts/cnv/cache.py") from None
    return held


def begin(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Make `folder` ready to be filled. Returns what cache.json says: of an earlier run, or now `description`."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for unfinished in (*folder.glob(".cache.json.*"), *(folder / "shards").glob(".*.safetensors.*")):
        unfinished.unlink(missing_ok=True)
    if read_description(folder) is None:
        write_description(folder, {**description, "format": FORMAT, "index": None})
    return read_description(folder)


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".cache.json.{os.getpid()}"
    temporary.write_text(json.dumps(description, indent=1))
    _put_in_place(temporary, folder / "cache.json")


def complete(folder: Path, description: Mapping[str, Any], rejected: Iterable[Key]) -> int:
    """Index all entries, then let cache.json name the index and say what is in `description`. Returns how many there
    are. An entry that two ranks wrote is indexed once.

    rejected: keys of what could not be read.
    """
    names, columns = shard_names(folder), []
    for number, name in enumerate(names):
        keys = shard_keys(folder, name).T  # [2, n]
        columns.append(np.stack([*keys, (number << 32) + np.arange(keys.shape[1])]))
    failed = np.array([*rejected], dtype=np.int64).reshape(-1, 2).T  # [2, n]
    columns.append(np.stack([*failed, np.full(failed.shape[1], _REJECTED)]))
    index = np.concatenate(columns, axis=1)  # [3, N]
    index = index[:, np.lexsort((-index[2], index[1], index[0]))]
    first = np.ones(index.shape[1], dtype=bool)
    first[1:] = (index[:2, 1:] != index[:2, :-1]).any(axis=0)
    index = np.ascontiguousarray(index[:, first])

    file = f"index-{hashlib.sha256(index).hexdigest()[:16]}.npy"
    temporary = folder / f".{file}"
    with open(temporary, "wb") as out:
        np.save(out, index)
    _put_in_place(temporary, folder / file)
    write_description(folder, {**description, "format": FORMAT, "shards": names, "index": file})
    for other in folder.glob("index-*.npy"):
        if other.name != file:
            other.unlink()
    return int((index[2] != _REJECTED).sum())


class Cache:
    """Looks entries up. The index and the shards stay mapped files, which processes of a machine share.

    Raises:
        FileNotFoundError: there is no complete cache in `folder`.
        ValueError: it is of another version.
    """

    def __init__(self, folder: Path, setting: str):
        self.folder, self.setting = folder, setting
        self.flag = setting.replace("_", "-")
        description = read_description(folder)
        if description is None or description.get("index") is None:
            state = "holds no cache" if description is None else "is not complete"
            raise FileNotFoundError(
                f"{setting}: '{folder}' {state}: run `python scripts/cnv/cache.py CONFIG --output {folder.parent}` "
                "with the settings of this run (it goes on where it stopped)"
            )
        if description["format"] != FORMAT:
            raise ValueError(f"{setting}: '{folder}' has format {description['format']}, not {FORMAT}: make it anew")
        self.description = description
        highs, lows, self._places = np.load(folder / description["index"], mmap_mode="r")
        self._index = _KeyIndex(highs, lows)

    def get(self, key: Key) -> dict[str, Tensor] | None:
        """An entry's tensors; None if what it is of could not be read.

        Raises:
            NotCachedError: there is no such entry.
        """
        at = self._index.find(key)
        if at is None:
            raise NotCachedError(
                f"{self.setting}='{self.folder.parent}' is stale: it lacks what a row of the table has now (its path, "
                "size, length, rate or text): run scripts/cnv/cache.py again, which adds what is new"
            )
        place = int(self._places[at])
        if place == _REJECTED:
            return None
        shard, names = self._open(place >> 32)
        position = place & (2**32 - 1)
        return {name: shard.get_slice(name)[position] for name in names}

    def __contains__(self, key: Key) -> bool:
        return self._index.find(key) is not None

    @cached_property
    def _open(self):
        """shard number -> (its open file, names of its tensors); the last ones used stay open."""

        @lru_cache(_OPEN_SHARDS)
        def open_shard(number: int):
            shard = safe_open(self.folder / "shards" / self.description["shards"][number], "pt")
            return shard, [name for name in shard.keys() if name != _KEYS]  # noqa: SIM118 - no mapping

        return open_shard
