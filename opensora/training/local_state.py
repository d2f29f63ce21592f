"""Optimizer state that is not laid out as its parameter: 8-bit numbers in blocks that share a scale.

Blocks are counted from where a rank's flat part of the parameter starts, so another number of ranks would cut through
them. Each rank writes its own state, for the same rank of as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from opensora.parallel.context import ParallelContext
from opensora.parallel.shards import ParameterShard

FOLDER = "optimizer_local"


def is_local(shard: ParameterShard, state: Mapping[str, Any]) -> bool:
    """Whether a shard's optimizer state has tensors that are neither one number nor laid out as its fp32 master."""
    master = shard.master
    tensors = [value for value in state.values() if torch.is_tensor(value) and value.ndim]
    return any(value.shape != master.shape or value.dtype != master.dtype for value in tensors)


def write_local_state(states: Mapping[str, Mapping[str, Any]], file: BinaryIO) -> None:
    """Write the states by parameter name."""
    plain = {
        name: {key: _plain(value) if torch.is_tensor(value) else value for key, value in state.items()}
        for name, state in states.items()
    }
    torch.save(plain, file)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host: tensors in paged memory, which are there already, carry attributes of bitsandbytes."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def read_local_state(checkpoint: Path, context: ParallelContext) -> dict[str, dict[str, Any]]:
    """What this rank wrote, by parameter name; empty if the optimizer of the checkpoint has no such state.

    Raises:
        ValueError: another number of ranks wrote it.
    """
    folder = checkpoint / FOLDER
    if not folder.is_dir():
        return {}
    writers = len(list(folder.glob("rank*.pt")))
    if writers != context.world_size:
        raise ValueError(
            f"--load {checkpoint}: its 8-bit optimizer state was written by {writers} processes and can't be divided "
            f"among {context.world_size}: start {writers}, or start from its weights with "
            f"--model.from_pretrained {checkpoint}"
        )
    return torch.load(folder / f"rank{context.rank}.pt", weights_only=True)
