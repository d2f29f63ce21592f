"""Batches for ranks that see the same samples: one of them reads, the others are given what it read.

Reading on each would cost as much again per rank, and a file that only one of them fails to read would let them
compute on different samples without noticing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.data.batch import Batch
from opensora.parallel.context import RankGroup


def send_batches(batches: Iterator[Batch], group: RankGroup) -> Iterator[Batch]:
    """The batches of an iterator, on the group's first rank, which hands each to the others. What reading raises ends
    the others too."""
    while True:
        try:
            batch = next(batches, None)
        except BaseException as error:  # Ctrl-C too
            with suppress(Exception):  # the error counts, not that the others could not be told
                _tell(group, ValueError(f"rank {dist.get_rank()} reads for this one, and failed: {error}"))
            raise
        if batch is None:
            _tell(group, None)
            return
        _tell(group, (replace(batch, video=None, encoded={}, rejected=[]), _layout(batch)))
        for tensor in _tensors(batch).values():
            dist.broadcast(tensor.contiguous(), group=group.process_group, group_src=0)
        yield batch


def receive_batches(group: RankGroup, device: torch.device) -> Iterator[Batch]:
    """What the group's first rank sends, with tensors on `device`. Rejected samples are listed on that rank alone."""
    while isinstance(told := _tell(group), tuple):
        batch, layout = told
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
        for tensor in tensors.values():
            dist.broadcast(tensor, group=group.process_group, group_src=0)
        video = tensors.pop("", None)
        yield replace(batch, video=video, encoded=tensors)
    if told is not None:
        raise told


def _tell(group: RankGroup, value: Any = None) -> Any:
    """The first rank's value, on all."""
    values = [value]
    dist.broadcast_object_list(values, group=group.process_group, group_src=0, device=torch.device("cpu"))
    return values[0]


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by name, the video under the empty one."""
    return batch.encoded if batch.video is None else {"": batch.video, **batch.encoded}


def _layout(batch: Batch) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(batch).items()}
