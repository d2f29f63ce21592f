"""What the frozen encoders make of a table, in a folder: written once, looked up while training.

FOLDER/cache.json                  what it was made with and for, the names of the shards and of the index
FOLDER/index-*.npy                 the keys of all entries, sorted, and where each entry is: see `cache_index`
FOLDER/shards/*.safetensors        "keys" int64 [n, 3], the marks of the files among them, and the tensors of n entries
                                   of one shape, stacked

An entry's key is a hash of all that it is of (a caption; a file and a window of it), not its row: a table may be
shuffled, cut or extended, and what is changed in it is not found. A file that was replaced is known by its mark, which
is kept beside the key: it is encoded anew, and not trained on as it was. Files are written under another name and
renamed; shards are never changed; cache.json names an index only when all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.data.cache_index import REJECTED, Key, KeyIndex, has_changed, write_index
from opensora.durable import HeldError, hold, put_in_place, write_whole
from opensora.fingerprint import content_hash

FORMAT = 2
STORED = "stored.npy"  # while the shards are written: the index of those of earlier runs
SHARD_BYTES = 256 << 20
_KEYS = "keys"
_OPEN_SHARDS = 64


class NotCachedError(ValueError):
    """An entry that the cache should have and has not: the table is not the one that it was made for."""


def entry_key(*parts: str | int) -> Key:
    """The key of an entry that is known by `parts`."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return Key(*np.frombuffer(digest, "<i8").tolist())


def text_key(caption: str) -> Key:
    """The key of a caption's embeddings."""
    return entry_key("text", caption)


class ShardWriter:
    """Writes entries into the shards of a folder; entries of one shape should follow each other."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder, self._shard_bytes = folder / "shards", shard_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keys: list[tuple[int, int, int]] = []
        self._entries: list[Mapping[str, Tensor]] = []
        self._bytes = 0

    def add(self, key: Key, entry: Mapping[str, Tensor], mark: int = 0) -> None:
        """mark: `file_mark` of the file that the entry is of."""
        if self._entries and _layout(entry) != _layout(self._entries[0]):
            self.flush()
        self._keys.append((*key, mark))
        self._entries.append({name: tensor.detach().cpu() for name, tensor in entry.items()})
        self._bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._entries:
            return
        tensors = {name: torch.stack([entry[name] for entry in self._entries]) for name in self._entries[0]}
        tensors[_KEYS] = torch.tensor(self._keys, dtype=torch.int64)  # [n, 3]
        name = f"{hashlib.sha256(tensors[_KEYS].numpy()).hexdigest()[:32]}.safetensors"  # equal only if all keys are
        temporary = self._folder / f".{name}.{os.getpid()}"
        temporary.touch()
        mode = temporary.stat().st_mode  # a file like any other: save_file's own are for their owner alone
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(f"'{self._folder}': {error}: make room on its disk, then start again") from error
        temporary.chmod(mode)
        put_in_place(temporary, self._folder / name)
        self._keys, self._entries, self._bytes = [], [], 0


def _layout(entry: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in entry.items()}


def shard_names(folder: Path) -> list[str]:
    """The newest last."""
    found = (folder / "shards").glob("[!.]*.safetensors")
    return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))]


def shard_keys(folder: Path, name: str) -> NDArray[np.int64]:
    """[n, 3]: the halves of the keys, and the marks of the files."""
    with safe_open(folder / "shards" / name, "pt") as shard:
        return shard.get_tensor(_KEYS).numpy()


def read_description(folder: Path) -> dict[str, Any] | None:
    """What cache.json says, None where there is none."""
    try:
        return json.loads((folder / "cache.json").read_text())
    except FileNotFoundError:
        return None


def lock(folder: Path) -> IO[str]:
    """Hold `folder` for one run: until the file that is returned is closed, or the process ends.

    Raises:
        ValueError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold(folder / ".lock")
    except HeldError as error:
        raise ValueError(
            f"'{folder}' is being written by another run of scripts/cnv/cache.py ({error.holder})"
        ) from None


def begin(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Make `folder` ready to be filled. Returns what cache.json says: of an earlier run, or now `description`.

    Raises:
        ValueError: an earlier version made it.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for unfinished in (
        *folder.glob(".*.json.*"),
        *folder.glob(".*.npy*"),
        *(folder / "shards").glob(".*.safetensors.*"),
    ):
        unfinished.unlink(missing_ok=True)
    if read_description(folder) is None:
        write_description(folder, {**description, "format": FORMAT, "index": None})
    _check_format(folder, read_description(folder), "output")
    write_index(folder / STORED, _rows_of_shards(folder, shard_names(folder)))
    return read_description(folder)


def stored_keys(folder: Path) -> KeyIndex:
    """The keys of all entries that were in the shards of a folder at its `begin`, indexed or not."""
    return KeyIndex.load(folder / STORED)


def _rows_of_shards(folder: Path, names: Iterable[str]) -> Iterator[NDArray[np.int64]]:
    """Rows of an index [n, 4], a shard at a time."""
    for number, name in enumerate(names):
        keys = shard_keys(folder, name)  # [n, 3]
        places = (number << 32) + np.arange(len(keys))
        yield np.column_stack([keys[:, :2], places, keys[:, 2]])


def _check_format(folder: Path, description: Mapping[str, Any], setting: str) -> None:
    if description["format"] != FORMAT:
        raise ValueError(f"{setting}: '{folder}' has format {description['format']}, not {FORMAT}: make it anew")


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "cache.json", json.dumps(description, indent=1))


def without_entry(folder: Path, rejected: Mapping[Key, str]) -> list[Key]:
    """Those of the keys, given with the paths of their files, that no shard has an entry of: a table may name a file
    twice, and another rank, or a later try, may have read what one could not. An entry of a file that has changed since
    is none."""
    marks, highs = {}, np.array([key.high for key in rejected], dtype=np.int64)
    for name in shard_names(folder) if rejected else ():
        keys = shard_keys(folder, name)  # [n, 3]
        for high, low, mark in keys[np.isin(keys[:, 0], highs)].tolist():
            marks[Key(high, low)] = mark
    return [key for key, path in rejected.items() if key not in marks or has_changed(path, marks[key])]


def complete(folder: Path, description: Mapping[str, Any], rejected: Iterable[Key]) -> int:
    """Index all entries, then let cache.json name the index and say what is in `description`. Returns how many there
    are. An entry that is in several shards (two ranks wrote it, or its file has changed since) is that of the newest.

    rejected: keys of what could not be read.
    """
    names = shard_names(folder)
    failed = np.array([(*key, REJECTED, 0) for key in rejected], dtype=np.int64).reshape(-1, 4)
    draft = folder / ".index.npy"
    write_index(draft, chain(_rows_of_shards(folder, names), [failed]))
    file = f"index-{content_hash(draft)[:16]}.npy"
    put_in_place(draft, folder / file)
    write_description(folder, {**description, "format": FORMAT, "shards": names, "index": file})
    for other in (*folder.glob("index-*.npy"), folder / STORED):
        if other.name != file:
            other.unlink(missing_ok=True)
    return int((KeyIndex.load(folder / file).places != REJECTED).sum())


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
        _check_format(folder, description, setting)
        self.description = description
        self.index = KeyIndex.load(folder / description["index"])

    def get(self, key: Key, path: str | None = None) -> dict[str, Tensor] | None:
        """An entry's tensors; None if what it is of could not be read.

        path: of the file that it is of, which may be gone.

        Raises:
            NotCachedError: there is no such entry, or the file is not the one that it is of.
        """
        at = self.index.find(key)
        if at is None:
            raise NotCachedError(
                f"{self.setting}='{self.folder.parent}' is stale: it lacks what a row of the table has now (its path, "
                "size, length, rate or text): run scripts/cnv/cache.py again, which adds what is new"
            )
        if path is not None and has_changed(path, int(self.index.marks[at])):
            raise NotCachedError(
                f"{self.setting}='{self.folder.parent}' is stale: '{path}' has changed since it was encoded (size or "
                "time): run scripts/cnv/cache.py again, which encodes it anew"
            )
        place = int(self.index.places[at])
        if place == REJECTED:
            return None
        shard, names = self._open(place >> 32)
        position = place & (2**32 - 1)
        return {name: shard.get_slice(name)[position] for name in names}

    def __contains__(self, key: Key) -> bool:
        return key in self.index

    @cached_property
    def _open(self):
        """shard number -> (its open file, names of its tensors); the last ones used stay open."""

        @lru_cache(_OPEN_SHARDS)
        def open_shard(number: int):
            shard = safe_open(self.folder / "shards" / self.description["shards"][number], "pt")
            return shard, [name for name in shard.keys() if name != _KEYS]  # noqa: SIM118 - no mapping

        return open_shard
