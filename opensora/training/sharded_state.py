"""Tensors that are spread over ranks, written and read by torch.distributed.checkpoint in their full logical shape.

Each rank writes the boxes it holds and reads the boxes it needs, so what one layout wrote (another number of ranks,
another ZeRO stage) any other reads. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from opensora.parallel.shards import LogicalTensor


def save_tensors(folder: Path, tensors: Mapping[str, LogicalTensor], group: dist.ProcessGroup) -> None:
    """Write the boxes of all ranks to `folder`, flushed to the disk. Every rank of `group` calls it.

    Raises:
        OSError or a torch error on every rank when any rank fails to write.
    """
    writer = dcp.FileSystemWriter(folder)
    dcp.save(dict(tensors), storage_writer=writer, planner=_SavePlanner(), process_group=group)


def load_tensors(folder: Path, tensors: Mapping[str, LogicalTensor], group: dist.ProcessGroup) -> None:
    """Fill the boxes of `tensors` from `folder`, whatever layout wrote it.

    Raises:
        ValueError: `folder` lacks a tensor, or holds it in another shape.
    """
    saved = _metadata(folder)
    missing = [key for key in tensors if key not in saved]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(tensors)} tensors, {missing[0]} among them")
    for key, tensor in tensors.items():
        if tuple(saved[key].size) != tuple(tensor.shape):
            raise ValueError(f"{folder}: {key} is {tuple(saved[key].size)}, the model's is {tuple(tensor.shape)}")
    reader = dcp.FileSystemReader(folder)
    dcp.load(dict(tensors), storage_reader=reader, planner=_LoadPlanner(), process_group=group)


def saved_names(folder: Path) -> set[str]:
    """The keys of the tensors in `folder`."""
    return set(_metadata(folder))


def _metadata(folder: Path) -> dict:
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} is not complete: it has no .metadata")
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


class _SavePlanner(DefaultSavePlanner):
    """Plans one item a box."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, tensor in self.state_dict.items():
            properties = TensorProperties(dtype=tensor.dtype)
            for box, _ in tensor.boxes:
                chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(tensor.shape))
                index = MetadataIndex(key, chunk.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return _box(self.state_dict[index.fqn], index)


class _LoadPlanner(DefaultLoadPlanner):
    """Plans what each box needs of the boxes that were written."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, tensor in self.state_dict.items():
            needed = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in tensor.boxes]
            items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], needed)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _box(self.state_dict[index.fqn], index)


def _box(tensor: LogicalTensor, index: MetadataIndex) -> torch.Tensor:
    offsets = tuple(index.offset)
    return next(view for box, view in tensor.boxes if box.offsets == offsets)
