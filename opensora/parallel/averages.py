"""The weights that a model computes with, taken from what ZeRO's ranks hold of them: to look at its averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from opensora.parallel.engine import Engine
from opensora.parallel.shards import ParameterShard

Flats = Iterable[tuple[ParameterShard, torch.Tensor]]


@torch.no_grad()
def write_weights(engine: Engine, flats: Flats) -> None:
    """Give the trained parameters the values of flat tensors that are laid out as the shards' masters.

    Every rank calls it. One parameter is gathered after the other, rounded to its dtype before: what ZeRO does with its
    masters after a step, so from them come the very weights of the last step.
    """
    from colossalai.zero.low_level._utils import all_gather_into_flat_tensor_nd, get_nd_world_size

    optimizer = engine.optimizer
    working = optimizer.get_master_to_working_map()
    for shard, flat in flats:
        parameter = working[id(shard.master)]
        group = optimizer.param_to_pg[parameter]
        piece = flat.to(parameter.device, parameter.dtype)
        whole = piece.new_empty(piece.numel() * get_nd_world_size(group))  # padded at its end
        all_gather_into_flat_tensor_nd(whole, piece, group)
        parameter.data.copy_(whole[: parameter.numel()].view_as(parameter))


@contextmanager
def averaged_weights(engine: Engine, averages: Flats | None) -> Iterator[None]:
    """Within the block the model computes with `averages`, and after it with its weights again, bit by bit.

    None leaves the weights. After an error in the block they stay averaged: to gather them takes all ranks, and the
    others may be elsewhere.
    """
    engine.wait_for_weights()
    if averages is None:
        yield
        return
    write_weights(engine, averages)
    yield
    write_weights(engine, [(shard, shard.master) for shard in engine.shards()])
