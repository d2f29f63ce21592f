"""Rectangles of flat ranges, and tensors that one layout writes and another reads."""

import math

import pytest
import torch

from opensora.parallel.shards import ParameterShard, rectangles
from opensora.parallel.snapshot import SnapshotMemory
from opensora.training.sharded_state import INDEX, ShardFile, format_index, load_tensors

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
    stacked = {f"{s.name}": (s.as_logical(s.master), s.as_logical(-s.master)) for s in shards(context, fill=True)}
    write_folder(context, folder, {"plain." + key: stack[:1] for key, stack in stacked.items()} | stacked)


def write_folder(context, folder, tensors):
    file = ShardFile(tensors, context.rank)
    contents = SnapshotMemory(context.device).take({file.name: file.nbytes}, file.pieces(file.name))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_bytes(contents[file.name])
    index = format_index(context.gather_objects(file.entries))
    if context.is_main:
        (folder / INDEX).write_bytes(index)
    context.barrier()


def read(context, folder):
    plain, positive, negative = (shards(context, fill=False) for _ in range(3))
    tensors = {f"plain.{s.name}": [s.as_logical(s.master)] for s in plain}
    for s, other in zip(positive, negative, strict=True):
        tensors[s.name] = [s.as_logical(s.master), s.as_logical(other.master)]
    load_tensors(folder, tensors, context.host_group)
    expected = [s.master for s in shards(context, fill=True)]
    found = ([s.master for s in some] for some in (plain, positive, negative))
    signs = (1, 1, -1)
    return all(
        torch.equal(a, sign * b)
        for masters, sign in zip(found, signs, strict=True)
        for a, b in zip(masters, expected, strict=True)
    )


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
            load_tensors(folder, {name: [shard.as_logical(master)]}, context.host_group)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_another_models_state_is_refused(one_rank, tmp_path):
    one_rank(write, tmp_path / "state")
    (messages,) = one_rank(read_wrong, tmp_path / "state")
    assert "vector is (2, 11), the model's is (12,)" in messages[0]
    assert "lacks 1 of 1 tensors, absent among them" in messages[1]
