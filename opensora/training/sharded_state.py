"""Tensors that are spread over ranks, in the format of torch.distributed.checkpoint and in their full logical shape.

Each rank writes the boxes it holds and reads the boxes it needs, so what one layout wrote (another number of ranks,
another ZeRO stage, other tensor-parallel sizes) any other reads. Nothing is gathered.

Tensors of one shape and layout (a parameter's fp32 master and its moments) are stacked: one tensor with a new first
dimension, so that the index of all boxes, which every rank reads, is that much smaller.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from opensora.parallel.shards import LogicalTensor
from opensora.parallel.snapshot import Piece
from opensora.training.tensor_frame import ALIGNMENT, MAX_BYTES, frame

INDEX = ".metadata"
# What is written under one key: one tensor, or several of one shape, dtype and layout, which are stacked.
Stack = Sequence[LogicalTensor]


class Entry(NamedTuple):
    """A box that a rank wrote: of which tensor, and where in the rank's file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: int
    nbytes: int


class _Box(NamedTuple):
    """A box of a stack; `views` has one of each tensor in it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    views: tuple[Tensor, ...]


class ShardFile:
    """What one rank writes of `tensors`.

    Attributes:
        name: of the file in the folder. nbytes: its size, 0 if the rank holds nothing.
        entries: its part of the folder's index (`format_index`).
    """

    def __init__(self, tensors: Mapping[str, Stack], rank: int):
        self.name, self.nbytes = f"__{rank}_0.distcp", 0
        self.entries: list[Entry] = []
        self._views: list[tuple[Tensor, ...]] = []
        for key, stack in tensors.items():
            for box in chain.from_iterable(map(_small, _boxes(stack))):
                self._add(key, _shape(stack), box)

    def _add(self, key: str, shape: tuple[int, ...], box: _Box) -> None:
        dtype = box.views[0].dtype
        before, after = frame(box.sizes, dtype)
        nbytes = len(before) + math.prod(box.sizes) * dtype.itemsize + len(after)
        self.entries.append(Entry(key, shape, dtype, box.offsets, box.sizes, self.nbytes, nbytes))
        self._views.append(box.views)
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def pieces(self, file: str) -> Iterator[Piece]:
        """The bytes of the file, which is called `file` in the checkpoint."""
        for entry, views in zip(self.entries, self._views, strict=True):
            before, after = frame(entry.sizes, entry.dtype)
            yield Piece(file, entry.place, before)
            place = entry.place + len(before)
            for view in views:
                yield Piece(file, place, view)
                place += view.nbytes
            yield Piece(file, place, after)


def format_index(entries_by_rank: Sequence[Sequence[Entry]]) -> bytes:
    """The index of a folder to which each rank wrote its ShardFile."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for rank, entries in enumerate(entries_by_rank):
        for entry in entries:
            if entry.key not in tensors:
                properties = TensorProperties(dtype=entry.dtype)
                tensors[entry.key] = TensorStorageMetadata(properties, torch.Size(entry.shape), [])
            offsets = torch.Size(entry.offsets)
            tensors[entry.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry.sizes)))
            places[MetadataIndex(entry.key, offsets)] = _StorageInfo(f"__{rank}_0.distcp", entry.place, entry.nbytes)
    return pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places))


def load_tensors(folder: Path, tensors: Mapping[str, Stack], group: dist.ProcessGroup) -> None:
    """Fill the boxes of `tensors` from `folder`, whatever layout wrote it.

    Raises:
        ValueError: `folder` lacks a tensor, or holds it in another shape.
    """
    saved = _metadata(folder)
    missing = [key for key in tensors if key not in saved]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(tensors)} tensors, {missing[0]} among them")
    for key, stack in tensors.items():
        if tuple(saved[key].size) != _shape(stack):
            raise ValueError(f"{folder}: {key} is {tuple(saved[key].size)}, the model's is {_shape(stack)}")
    reader = dcp.FileSystemReader(folder)
    dcp.load(dict(tensors), storage_reader=reader, planner=_LoadPlanner(), process_group=group)


def saved_names(folder: Path) -> set[str]:
    """The keys of the tensors in `folder`."""
    return set(_metadata(folder))


def _metadata(folder: Path) -> dict:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is not complete: it has no {INDEX}")
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def _shape(stack: Stack) -> tuple[int, ...]:
    shape = tuple(stack[0].shape)
    return shape if len(stack) == 1 else (len(stack), *shape)


def _boxes(stack: Stack) -> Iterator[_Box]:
    for boxes in zip(*(tensor.boxes for tensor in stack), strict=True):
        box, views = boxes[0][0], tuple(view for _, view in boxes)
        if len(stack) == 1:
            yield _Box(box.offsets, box.sizes, views)
        else:
            yield _Box((0, *box.offsets), (len(stack), *box.sizes), views)


def _small(box: _Box) -> Iterator[_Box]:
    """The box, or the halves of one that is too large for a frame."""
    if math.prod(box.sizes) * box.views[0].itemsize <= MAX_BYTES:
        yield box
        return
    shape = box.views[0].shape
    dim = next(dim for dim, size in enumerate(shape) if size > 1)
    place = dim + len(box.sizes) - len(shape)  # the same dimension of the stack
    for start, stop in ((0, shape[dim] // 2), (shape[dim] // 2, shape[dim])):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[place], sizes[place] = offsets[place] + start, stop - start
        views = tuple(view.narrow(dim, start, stop - start) for view in box.views)
        yield from _small(_Box(tuple(offsets), tuple(sizes), views))


class _LoadPlanner(DefaultLoadPlanner):
    """Plans what each box needs of the boxes that were written."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self._boxes = {(key, box.offsets): box for key, stack in state_dict.items() for box in _boxes(stack)}

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, stack in self.state_dict.items():
            needed = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in _boxes(stack)]
            items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], needed)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a part of a box is read to."""
        views = self._views(read_item)
        return views[0] if len(views) == 1 else torch.empty(read_item.lengths, dtype=views[0].dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        views = self._views(read_item)
        for view, part in zip(views, tensor, strict=True) if len(views) > 1 else ():
            view.copy_(part)

    def _views(self, read_item: ReadItem) -> list[Tensor]:
        box = self._boxes[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        offsets, lengths = list(read_item.dest_offsets), list(read_item.lengths)
        if len(box.views) > 1:  # stacks are always read as a whole
            offsets, lengths = offsets[1:], lengths[1:]
        return [_part(view, offsets, lengths) for view in box.views]


def _part(view: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        view = view.narrow(dim, offset, length)
    return view
