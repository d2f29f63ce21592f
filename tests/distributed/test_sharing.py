"""Batches that two ranks code together: every rank gets what a single process makes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import opensora.models  # noqa: F401
from opensora.models.frozen import build_frozen
from opensora.parallel.sharing import assign, share_autoencoder, share_work
from opensora.registry import AUTOENCODERS

TILED = {
    "type": "hunyuan_vae",
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": [8, 16, 16, 16],
    "use_spatial_tiling": True,
    "use_temporal_tiling": True,
    "sample_size": 32,
    "sample_tsize": 16,
    "micro_batch_pixels": 1,  # one item at a time in any number of processes: the same kernels
}
SMALL_2D = {"type": "autoencoder_2d", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "micro_batch_pixels": 1}
CASES = {  # autoencoder, sizes of a batch of videos, how many items it is
    "one tiled clip": (TILED, (1, 3, 21, 40, 56), 2 * 2 * 3),
    "three clips": ({**TILED, "use_spatial_tiling": False}, (3, 3, 5, 16, 24), 3),
    "fewer than ranks": (TILED, (1, 3, 5, 16, 24), 1),
    "frames": (SMALL_2D, (1, 3, 5, 16, 16), 5),
    "linear": ({"type": "linear_causal"}, (3, 3, 9, 16, 24), 3),
}
WITHIN = {"linear": {"atol": 1e-6, "rtol": 1e-5}}  # its samples make one matrix: another product on two ranks


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(settings):
    autoencoder = build_frozen(AUTOENCODERS, settings, "ae", torch.float32, "cpu")
    if settings["type"] == "linear_causal":
        autoencoder.fit([normal(2, 3, 5, 32, 32)])
    return autoencoder


def code(context, settings, size):
    """Latents, pixels, and how many items this rank computed of each."""
    autoencoder = build(settings)
    if context is not None:
        share_autoencoder(autoencoder, dist.group.WORLD)
    counts = count_items(autoencoder)
    latents = autoencoder.encode(normal(*size), lambda shape: normal(*shape, seed=1))
    return latents, autoencoder.decode(latents), counts


def count_items(autoencoder) -> list[int]:
    counts, map_items = [], autoencoder.map_items

    def counting(work, items):
        def counted(part):
            counts.append(len(part))
            return work(part)

        return map_items(counted, items)

    autoencoder.map_items = counting
    return counts


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_what_one_process_makes(two_ranks, case):
    settings, size, items = CASES[case]
    latents, pixels, counts = code(None, settings, size)
    assert counts == [items, items]
    one, other = two_ranks(code, settings, size)
    for found in (one, other):
        torch.testing.assert_close(found[0], latents, **WITHIN.get(case, {"atol": 0, "rtol": 0}))
        torch.testing.assert_close(found[1], pixels, **WITHIN.get(case, {"atol": 0, "rtol": 0}))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    alone = items == 1
    assert one[2] == ([1, 1] if alone else [(items + 1) // 2] * 2)
    assert other[2] == ([] if alone else [items // 2] * 2)


def bf16_in_inference_mode(context):
    autoencoder = build(TILED).bfloat16()
    share_autoencoder(autoencoder, dist.group.WORLD)
    with torch.inference_mode():
        latents = autoencoder.encode(normal(1, 3, 17, 40, 40).bfloat16())
        return [x.clone() for x in (latents, autoencoder.decode(latents))]


def test_bf16_in_inference_mode(two_ranks):
    one, other = two_ranks(bf16_in_inference_mode)
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(one, other, strict=True))


def test_one_rank_shares_nothing(one_rank):
    assert one_rank(is_replaced) == [False]


def is_replaced(context):
    autoencoder = build({"type": "linear_causal"})
    before = autoencoder.map_items
    share_autoencoder(autoencoder, dist.group.WORLD)
    return autoencoder.map_items is not before


# --------------------------------------------------------------------------------------------------- share_work


def results_of_any_shape(context):
    """Shapes and dtypes of results that only their rank knows: also empty ones and numbers."""
    shapes = [(3, 2), (), (0, 4), (5,), (1, 1, 7)]
    items = [torch.full((1 + index,), float(index)) for index in range(len(shapes))]
    dtypes = [torch.float64, torch.int32]

    def work(part):
        return [torch.full(shapes[int(x[0])], int(x[0]), dtype=dtypes[context.rank]) for x in part]

    found = share_work(dist.group.WORLD, work, items)
    return [(tuple(x.shape), x.dtype, x.flatten().tolist()) for x in found]


def test_results_of_any_shape(two_ranks):
    one, other = two_ranks(results_of_any_shape)
    assert one == other
    assert [shape for shape, _, _ in one] == [(3, 2), (), (0, 4), (5,), (1, 1, 7)]
    assert all(set(values) <= {index} for index, (_, _, values) in enumerate(one))
    assert {dtype for _, dtype, _ in one} == {torch.float64, torch.int32}


def nothing(context):
    return share_work(dist.group.WORLD, lambda part: [*part], [])


def test_no_items(two_ranks):
    assert two_ranks(nothing) == [[], []]


def outcome(work, items) -> str:
    try:
        share_work(dist.group.WORLD, work, items)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def fails_on(context, rank):
    def work(part):
        if context.rank == rank:
            raise ValueError("frames of green cheese")
        return [*part]

    first = outcome(work, [torch.ones(2), torch.ones(2), torch.ones(2)])
    again = share_work(dist.group.WORLD, lambda part: [2 * item for item in part], [torch.ones(1), torch.ones(1)])
    return first, [item.item() for item in again]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_one_on_both(two_ranks, rank):
    """At once, and the group is as good as before."""
    found = two_ranks(fails_on, rank)
    complaint = "ValueError: frames of green cheese"
    assert found[rank][0] == complaint
    assert (
        found[1 - rank][0] == f"RuntimeError: rank {rank}, which does a part of this rank's work, failed: {complaint}"
    )
    assert [values for _, values in found] == [[2.0, 2.0]] * 2


def other_items(context, lengths):
    return outcome(lambda part: [*part], [torch.ones(length) for length in lengths[context.rank]])


@pytest.mark.parametrize("lengths", [((2, 2), (2, 3)), ((2, 2), (2, 2, 2))])
def test_ranks_with_other_items_are_told(two_ranks, lengths):
    expected = "RuntimeError: rank 1 was given other work than the ranks that it shares it with"
    assert two_ranks(other_items, lengths) == [expected, expected]


@pytest.mark.parametrize(
    "costs, ranks, loads",
    [
        ([4, 4, 4, 4], 2, [8, 8]),
        ([1, 1, 1, 9], 2, [9, 3]),
        ([5, 4, 3, 3, 3], 2, [8, 10]),  # the best is 9: within 7/6 of it (Graham 1969)
        ([3], 4, [3, 0, 0, 0]),
        ([256, 256, 256, 192, 256, 256, 256, 192], 8, [256, 256, 256, 256, 256, 256, 192, 192]),
    ],
)
def test_costs_are_balanced(costs, ranks, loads):
    owners = assign(costs, ranks)
    assert [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks)] == loads
