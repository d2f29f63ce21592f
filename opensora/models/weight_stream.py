"""Safetensors files written tensor by tensor, so that memory does not grow with them.

The format: 8 bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, place), the bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.models.weight_files import SAFETENSORS_DTYPES

ALIGNMENT = 8  # of the first tensor, in bytes
WRITE_BYTES = 2**26
_NAME_OF = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class TensorSpec(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stream_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda number: None,
) -> None:
    """Write the tensors of `specs` to a file; it is on the disk when this returns.

    Args:
        read: gives a tensor by name when its turn comes, in its spec's shape and dtype.
        on_bytes: called with the size of what has been written since the last call.
    """
    header, offsets = safetensors_layout(specs, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for name in offsets:
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise RuntimeError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {specs[name]}")
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), WRITE_BYTES):
                on_bytes(file.write(flat[start : start + WRITE_BYTES]))
        file.flush()
        os.fsync(file.fileno())


def safetensors_layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """(the bytes that a file begins with, the byte at which each tensor begins) in the order of the file."""
    # wide dtypes first: each tensor then begins at a multiple of its element's size, as readers that map files expect
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in names:
        spec = specs[name]
        offsets[name], end = end, end + spec.nbytes
        header[name] = {"dtype": _NAME_OF[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + offset for name, offset in offsets.items()}
