"""Rectangles of flat ranges, and tensors that one layout writes and another reads."""

import math

import pytest
import torch

from opensora.parallel.shards import ParameterShard, rectangles
from opensora.training.sharded_state import load_tensors, save_tensors

SHAPES = {"matrix": (5, 7), "vector": (11,), "kernel": (3, 2, 2, 5), "scalar": (), "short": (1,)}


@pytest.mark.parametrize("shape", SHAPES.values())
def test_rectangles_cover_every_range(shape):
    numel = math.prod(shape)
    logical = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            boxes = list(rectangles(shape, start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            found = torch.full((stop - start,), -1)
            for box in boxes:
                index = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                values = logical[index].flatten()
                found[box.position : box.position + len(values)] = values
            assert found.tolist() == list(range(start, stop))


def shards(context, fill) -> list[ParameterShard]:
    """Each tensor cut over the ranks as ZeRO does: padded at the end, one range a rank."""
    found = []
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        per_rank = -(-numel // context.world_size)
        start = min(context.rank * per_rank, numel)
        stop = min(start + per_rank, numel)
        master = torch.zeros(per_rank)
        if fill:
            master[: stop - start] = torch.arange(start, stop).float() + len(name)
        found.append(ParameterShard(name, torch.Size(shape), start, stop, master))
    return found


def write(context, folder):
    save_tensors(folder, {s.name: s.as_logical(s.master) for s in shards(context, fill=True)}, context.host_group)


def read(context, folder):
    empty = shards(context, fill=False)
    load_tensors(folder, {s.name: s.as_logical(s.master) for s in empty}, context.host_group)
    expected = shards(context, fill=True)
    return all(torch.equal(a.master, b.master) for a, b in zip(empty, expected, strict=True))


def test_any_layout_reads_what_any_wrote(one_rank, two_ranks, tmp_path):
    for writer in (one_rank, two_ranks):
        folder = tmp_path / str(writer.world_size)
        writer(write, folder)
        for reader in (one_rank, two_ranks):
            assert all(reader(read, folder))


def read_wrong(context, folder):
    master = torch.zeros(12)
    shard = ParameterShard("vector", torch.Size((12,)), 0, 12, master)
    messages = []
    for name in ("vector", "absent"):
        try:
            load_tensors(folder, {name: shard.as_logical(master)}, context.host_group)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_another_models_state_is_refused(one_rank, tmp_path):
    one_rank(write, tmp_path / "state")
    (messages,) = one_rank(read_wrong, tmp_path / "state")
    assert "vector is (11,), the model's is (12,)" in messages[0]
    assert "lacks 1 of 1 tensors, absent among them" in messages[1]
