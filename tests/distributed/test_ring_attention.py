"""Ring attention against softmax by hand, in float64, over the whole sequence."""

import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from opensora.parallel import ring
from opensora.parallel.ring import ring_attention

# The norm of the error over that of the result. torch's own attention over the whole sequence: 5e-3 in bf16.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def sequence(length, batch=2, heads=3, dim=8, dtype=torch.float32, seed=0):
    """q, k, v and the weights of the output in the loss, [B, H, L, D]; k and v are larger at later positions."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(4))
    growth = 1 + torch.arange(length).view(-1, 1) / max(1, length)
    return [x.to(dtype) for x in (2 * q, growth * k, growth * v, weight)]


def assert_near(found, expected, tolerance, what=""):
    error, size = ((found.double() - expected).norm().item(), expected.norm().item())
    assert error <= tolerance * max(size, 1), f"{what} is off by {error:.1e}, with a norm of {size:.1e}"


def by_hand(q, k, v, weight):
    """[output [B, L, H*D], dq, dk, dv]."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    gradients = torch.autograd.grad((out * weight.double()).sum(), (q, k, v))
    return [out.detach().transpose(1, 2).flatten(2), *gradients]


def laid_out(x, layout):
    """`x` [B, H, L, D], in memory [B, L, H, D] as a block's projections give it (heads), as it is, or transposed."""
    if layout == "heads":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT if layout == "columns" else x.contiguous()


def attend_on_ranks(context, lengths, members, options, layout="heads", checkpointed=False):
    """[output, dq, dk, dv] of this rank's part; None where it is in none of the groups of ranks `members`."""
    groups = [dist.new_group(ranks) for ranks in members]
    for group, ranks in zip(groups, members, strict=True):
        if context.rank in ranks:
            place = ranks.index(context.rank)
            parts = [x.split(lengths, dim=2)[place] for x in sequence(sum(lengths), seed=ranks[0], **options)]
            return attend_on_rank(context, group, lengths, parts, layout, checkpointed)
    return None


def attend_on_rank(context, group, lengths, parts, layout, checkpointed):
    q, k, v, weight = (laid_out(x.to(context.device), layout).requires_grad_() for x in parts)

    def attend(q, k, v):
        return ring_attention(q * 1, k * 1, v, group, lengths)

    out = checkpoint(attend, q, k, v, use_reentrant=False) if checkpointed else attend(q, k, v)
    assert out.dtype == q.dtype
    gradients = torch.autograd.grad((out * weight.transpose(1, 2).flatten(2)).sum(), (q, k, v))
    assert all(gradient.dtype == q.dtype for gradient in gradients)
    return [x.detach().cpu() for x in (out, *gradients)]


def check(ranks, lengths, members, tolerance=None, **options):
    how = [options.pop(name) for name in ("layout", "checkpointed") if name in options]
    results = ranks(attend_on_ranks, lengths, members, options, *how)
    tolerance = tolerance or TOLERANCE[options.get("dtype", torch.float32)]
    for group in members:
        expected = by_hand(*sequence(sum(lengths), seed=group[0], **options))
        out, dq, dk, dv = zip(*(results[rank] for rank in group), strict=True)
        assert_near(torch.cat(out, 1), expected[0], tolerance, "out")
        for name, parts, correct in zip(("dq", "dk", "dv"), (dq, dk, dv), expected[1:], strict=True):
            assert_near(torch.cat(parts, 2), correct, tolerance, name)


@pytest.mark.parametrize("lengths", [[13], [1], [0]])
@pytest.mark.parametrize("layout", ["heads", "contiguous", "columns"])
def test_one_rank(one_rank, lengths, layout):
    check(one_rank, lengths, [[0]], layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[20, 20], [21, 4], [1, 9], [0, 7], [7, 0], [0, 0]])
def test_two_ranks(two_ranks, lengths, dtype):
    check(two_ranks, lengths, [[0, 1]], dtype=dtype)


@pytest.mark.parametrize("layout", ["heads", "contiguous", "columns"])
def test_heads_of_any_size_and_layout(two_ranks, layout):
    check(two_ranks, [9, 5], [[0, 1]], dim=5, heads=1, batch=1, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[16, 16, 16, 16], [33, 1, 0, 14], [0, 0, 5, 0]])
def test_four_ranks(four_ranks, lengths, dtype):
    check(four_ranks, lengths, [[0, 1, 2, 3]], dtype=dtype)


@pytest.mark.parametrize(
    "members, lengths",
    [([[0, 2]], [11, 6]), ([[0, 2], [1, 3]], [11, 6]), ([[0, 1], [2, 3]], [0, 6]), ([[1, 2, 3]], [4, 9, 2])],
)
def test_groups_of_some_ranks(four_ranks, members, lengths):
    check(four_ranks, lengths, members)


def test_the_order_of_a_group_is_its_own(four_ranks):
    results = four_ranks(attend_in_reverse, [5, 3])
    expected = by_hand(*sequence(8))
    assert_near(torch.cat([results[3], results[1]], 1), expected[0], TOLERANCE[torch.float32])


def attend_in_reverse(context, lengths):
    group = dist.new_group([3, 1], sort_ranks=False)
    if context.rank not in (1, 3):
        return None
    q, k, v, _ = (x.split(lengths, dim=2)[dist.get_rank(group)] for x in sequence(sum(lengths)))
    return ring_attention(q, k, v, group, lengths)


@pytest.mark.parametrize("lengths", [[9, 5], [6, 0]])
def test_recomputed_in_the_backward_pass(two_ranks, lengths):
    check(two_ranks, lengths, [[0, 1]], layout="heads", checkpointed=True)


def test_called_from_compiled_code(one_rank):
    (out,) = one_rank(attend_compiled, 13)
    assert_near(out, by_hand(*sequence(13))[0], TOLERANCE[torch.float32])


def attend_compiled(context, length):
    attend = torch.compiler.disable(ring_attention)  # a graph can't wait for other ranks

    def block(q, k, v):
        return attend(q / 2, k * 2, v, dist.group.WORLD, [length]) + 0

    q, k, v, _ = (x.to(context.device) for x in sequence(length))
    return torch.compile(block, backend="eager")(q, k, v).cpu()


# ------------------------------------------------------------------------------------------------- bytes and memory


@pytest.mark.parametrize("lengths", [[12, 12, 12, 12], [20, 1, 0, 7]])
def test_what_is_sent(four_ranks, lengths):
    """Each block of keys and values goes to each other rank once, the sums of its gradients make as many hops."""
    positions = [sum(lengths) - lengths[(rank + 1) % 4] for rank in range(4)]  # all blocks but the next rank's own
    positions_back = [sum(lengths) - lengths[rank] for rank in range(4)]  # its own is never sent away
    for sent, keys, gradients in zip(four_ranks(bytes_sent, lengths), positions, positions_back, strict=True):
        numbers = 2 * 2 * 3 * 8  # keys and values, batch, heads, dim
        spare = 3 * 4 * lengths.count(0)  # an element for an empty block
        forward, backward = 2 * numbers * keys, (2 * keys + 4 * gradients) * numbers  # bf16 and fp32
        assert forward <= sent[0] <= forward + spare
        assert backward <= sent[1] <= backward + 2 * spare


def bytes_sent(context, lengths):
    sent = []

    def exchange(operations):
        sent[-1] += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return unwatched(operations)

    unwatched = dist.batch_isend_irecv
    q, k, v, weight = (x.split(lengths, dim=2)[context.rank] for x in sequence(sum(lengths), dtype=torch.bfloat16))
    with patch.object(dist, "batch_isend_irecv", exchange):
        sent.append(0)
        out = ring_attention(*(x.requires_grad_() for x in (q, k, v)), dist.group.WORLD, lengths)
        sent.append(0)
        (out * weight.transpose(1, 2).flatten(2)).sum().backward()
    return sent


def test_memory_grows_with_the_length_not_its_square(two_ranks):
    length, dim = 4096, 8
    for largest in two_ranks(largest_allocation, length, dim):
        assert 4 * length * dim <= largest <= 16 * 4 * length * dim < 4 * length * length / 8


def largest_allocation(context, length, dim):
    """What any one operator of a forward and a backward pass leaves allocated, in bytes."""
    q, k, v, weight = sequence(length, batch=1, heads=1, dim=dim)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = ring_attention(*(x.requires_grad_() for x in (q, k, v)), dist.group.WORLD, [length, length])
        (out * weight.transpose(1, 2).flatten(2)).sum().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


# ---------------------------------------------------------------------------------------------------------- kernels


def check_kernel(kernel, dtype, device="cpu", dim=16, tolerance=None):
    """A ring by hand: the blocks of keys one after another."""
    q, k, v, weight = (laid_out(x, "heads").to(device) for x in sequence(75, dim=dim, dtype=dtype))
    blocks = [(keys.split([40, 1, 34], 2)) for keys in (k, v)]
    scale = dim**-0.5
    merged = None
    for keys, values in zip(*blocks, strict=True):
        merged = ring.merge(merged, kernel.forward(q, keys, values, scale))
    assert merged.lse.dtype == torch.promote_types(dtype, torch.float32)
    merged = merged._replace(out=merged.out.to(dtype))
    parts = [kernel.backward(weight, q, *block, merged, scale) for block in zip(*blocks, strict=True)]
    dq, dk, dv = (list(gradients) for gradients in zip(*parts, strict=True))
    found = [merged.out.transpose(1, 2).flatten(2), sum(x.double() for x in dq), torch.cat(dk, 2), torch.cat(dv, 2)]
    for name, result, correct in zip(("out", "dq", "dk", "dv"), found, by_hand(q, k, v, weight), strict=True):
        assert_near(result, correct, tolerance or TOLERANCE[dtype], name)


@pytest.mark.parametrize("kernel", ["CPU_FLASH", "MATH"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_the_cpu(kernel, dtype):
    check_kernel(getattr(ring, kernel), dtype)


@pytest.mark.parametrize("kernel", ["FLASH", "EFFICIENT"])
def test_arguments_are_those_of_the_operators_for_cuda(kernel):
    """Shapes only: what torch's operators take and return has changed between versions before."""
    q, k, v, weight = (x.to("meta") for x in sequence(75, dtype=torch.bfloat16))
    kernel = getattr(ring, kernel)
    merged = ring.merge(kernel.forward(q, k[:, :, :40], v[:, :, :40], 1.0), kernel.forward(q, k, v, 1.0))
    assert merged.out.shape == q.shape and merged.lse.shape == q.shape[:3]
    gradients = kernel.backward(weight, q, k, v, merged, 1.0)
    assert [x.shape for x in gradients] == [q.shape] * 3


GPU_KERNELS = {
    torch.bfloat16: ["FLASH", "EFFICIENT", "MATH"],
    torch.float16: ["FLASH", "EFFICIENT", "MATH"],
    torch.float32: ["EFFICIENT", "MATH"],
    torch.float64: ["MATH"],
}
GPU_TOLERANCE = TOLERANCE | {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, kernel", [(dtype, kernel) for dtype in DTYPES for kernel in GPU_KERNELS[dtype]])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_of_a_gpu(dtype, kernel, dim):
    check_kernel(getattr(ring, kernel), dtype, "cuda", dim, GPU_TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 64])
def test_one_gpu(one_rank, dtype, dim):
    heads = torch.zeros(1, 1, 4, 64, dtype=dtype, device="cuda")
    assert ring.choose_kernel(heads) is getattr(ring, GPU_KERNELS[dtype][0])
    check(one_rank, [77], [[0]], GPU_TOLERANCE[dtype], dtype=dtype, dim=dim)
