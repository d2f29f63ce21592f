"""What torch.save writes around a tensor's bytes, made without the bytes.

torch.load reads a ZIP archive of stored (uncompressed) records: a pickle that describes the tensor, the byte order, a
version, the bytes. Made apart, the bytes can be copied straight to where they belong. Their checksum is left out, as
torch.serialization.set_crc32_options(False) does: torch.load does not look at it, and a checkpoint's manifest has one.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch._utils import _rebuild_tensor_v2

ALIGNMENT = 64  # of the tensor's bytes in the archive, as torch.save has it
MAX_BYTES = 2**31  # of a tensor: without 64-bit fields an archive ends at 4 GiB
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class Frame(NamedTuple):
    """The bytes before and after a tensor's own."""

    before: bytes
    after: bytes


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """What torch.load needs around the bytes of a contiguous tensor, of no more than MAX_BYTES."""
    numel = torch.Size(shape).numel()
    assert numel * dtype.itemsize <= MAX_BYTES, f"a tensor of shape {shape} needs an archive with 64-bit fields"
    archive = _Archive()
    archive.add("data.pkl", _describe(shape, numel, dtype))
    archive.add("byteorder", sys.byteorder.encode())
    archive.add("version", b"3\n")
    archive.begin("data/0", numel * dtype.itemsize)
    return Frame(bytes(archive.records), archive.directory(len(archive.records) + numel * dtype.itemsize))


class _Archive:
    """The records of a ZIP archive, and the directory at its end."""

    def __init__(self):
        self.records, self._entries, self._count = bytearray(), bytearray(), 0

    def add(self, name: str, content: bytes) -> None:
        self.begin(name, len(content), zlib.crc32(content))
        self.records += content

    def begin(self, name: str, nbytes: int, crc32: int = 0) -> None:
        """Write the head of a record; the content is to follow at a multiple of ALIGNMENT."""
        path, place = b"archive/" + name.encode(), len(self.records)
        padding = -(place + 30 + 4 + len(path)) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        # version needed, flags, method, time, date, checksum, both sizes, length of the name
        facts = struct.pack("<5H3IH", 20, 0, 0, 0, 0, crc32, nbytes, nbytes, len(path))
        self.records += b"PK\3\4" + facts + struct.pack("<H", len(extra)) + path + extra
        self._entries += b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<4H2I", 0, 0, 0, 0, 0, place) + path
        self._count += 1

    def directory(self, place: int) -> bytes:
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, self._count, self._count, len(self._entries), place, 0)
        return bytes(self._entries) + end


class _Described:
    """Pickles as a tensor whose storage is elsewhere."""

    def __init__(self, shape: tuple[int, ...], storage: tuple):
        strides = torch.empty(shape, device="meta").stride()
        self._state = (_Storage(storage), 0, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return _rebuild_tensor_v2, self._state


class _Storage(NamedTuple):
    facts: tuple


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.facts if isinstance(obj, _Storage) else None


def _describe(shape: tuple[int, ...], numel: int, dtype: torch.dtype) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Described(shape, ("storage", _STORAGES[dtype], "0", "cpu", numel)))
    return stream.getvalue()
