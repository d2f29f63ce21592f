"""Ring attention: exact attention over a sequence that lies in parts on the ranks of a group.

Each rank keeps its queries; keys and values go round the ring of ranks, a block at a time (Liu et al., "Ring Attention
with Blockwise Transformers", 2023). The softmaxes over the blocks are merged by their log-sum-exps. The backward pass
of a block is its kernel's own, which takes the merged output and log-sum-exp. The kernels are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

CUDA_HEAD_DIM_MULTIPLE = 8  # the kernels for CUDA read heads of such dimensions
EFFICIENT_LSE_MULTIPLE = 32  # the log-sum-exp of the efficient kernel has so many rows, or a multiple


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, lengths: Sequence[int]) -> Tensor:
    """softmax(q kᵀ / √D) v over the positions of all ranks of `group`: q, k, v [B, H, L_r, D] -> [B, L_r, H*D].

    All ranks of the group call it, and its backward, in the same order; also those without a position.

    Args:
        q, k, v: this rank's part of the sequence, of any strides.
        lengths: the positions of each rank, in the group's order. They may differ and be 0.
    """
    assert len(lengths) == group.size() and q.shape[2] == k.shape[2] == v.shape[2] == lengths[group.rank()]
    head_dim = q.shape[-1]
    if q.is_cuda and head_dim % CUDA_HEAD_DIM_MULTIPLE:  # zeros add nothing to the scores, and columns to the output
        q, k, v = (F.pad(x, (0, -head_dim % CUDA_HEAD_DIM_MULTIPLE)) for x in (q, k, v))
    out = _RingAttention.apply(q, k, v, head_dim**-0.5, Ring(group, tuple(lengths)))  # [B, L, H, D]
    return out[..., :head_dim].flatten(2)  # [B, L, H*D]


class _RingAttention(torch.autograd.Function):
    """q, k, v [B, H, L, D] -> [B, L, H, D]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, ring: Ring) -> Tensor:
        q = q if q.stride(-1) == 1 else q.contiguous()  # the only stride that the kernels prescribe
        kernel = choose_kernel(q)
        merged = None if q.numel() else Partial(torch.empty_like(q), q.new_empty(q.shape[:3]))
        for keys, values in ring.blocks(k, v):
            if q.numel() and keys.numel():
                merged = merge(merged, kernel.forward(q, keys, values, scale))
        out = merged.out.to(q.dtype).transpose(1, 2)  # [B, L, H, D]
        ctx.save_for_backward(q, k, v, out, merged.lse, *merged.random_state)
        ctx.kernel, ctx.scale, ctx.ring = kernel, scale, ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *random_state = ctx.saved_tensors
        merged = Partial(out.transpose(1, 2), lse, tuple(random_state))
        grad = grad.contiguous().transpose(1, 2)  # [B, H, L, D]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, own, arriving = torch.zeros_like(q, dtype=wide), None, None
        # The sums of a block's gradients start at the rank after its owner and go round, one step behind the block,
        # until they are home. What the owner itself has to add waits there.
        for step, (keys, values) in enumerate(ctx.ring.blocks(k, v)):
            gradients = (0, 0, 0)
            if q.numel() and keys.numel():
                gradients = ctx.kernel.backward(grad, q, keys, values, merged, ctx.scale)
            sums = arriving.wait() if arriving else keys.new_zeros(_pair_shape(keys), dtype=wide)
            for total, gradient in zip((dq, *_unpack(sums)), gradients, strict=True):
                total += gradient
            if step == 0:
                own = sums
            else:
                arriving = ctx.ring.pass_on(sums, step)
        if arriving:
            own += arriving.wait()
        dk, dv = _unpack(own.to(k.dtype))
        return dq.to(q.dtype), dk, dv, None, None


# ------------------------------------------------------------------------------------------------------- the exchange


class Ring(NamedTuple):
    """The ranks of `group`, of which each sends to the next; `lengths` are the positions of each."""

    group: dist.ProcessGroup
    lengths: tuple[int, ...]

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's own keys and values, then those of the rank before it, and so on: the owner of block `step` is
        `step` places back. While the caller uses a block, the next one is on its way."""
        held = _pack(k, v)
        for step in range(self.group.size() - 1):
            arriving = self.pass_on(held, step)
            yield _unpack(held)
            held = arriving.wait()
        yield _unpack(held)

    def pass_on(self, pair: Tensor, step: int) -> Exchange:
        """Begin to send the pair of block `step` to the next rank, and to receive that of block `step + 1`."""
        place, size = self.group.rank(), self.group.size()
        length = self.lengths[(place - step - 1) % size]
        received = pair.new_empty((*pair.shape[:2], length, *pair.shape[3:]))
        following, previous = (dist.get_global_rank(self.group, (place + side) % size) for side in (1, -1))
        operations = [
            dist.P2POp(dist.isend, _message(pair), following, self.group),
            dist.P2POp(dist.irecv, _message(received), previous, self.group),
        ]
        return Exchange(operations, dist.batch_isend_irecv(operations), received)


class Exchange(NamedTuple):
    """A pair under way to the next rank, and one from the previous rank. It keeps the memory of both."""

    operations: list[dist.P2POp]
    works: list[dist.Work]
    received: Tensor

    def wait(self) -> Tensor:
        """The pair received, once both are through. On CUDA the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.received


def _message(pair: Tensor) -> Tensor:
    """What is sent for `pair`: of an empty one an element, as NCCL wants all ranks in the first exchange of a group."""
    return pair if pair.numel() else pair.new_zeros(1)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """k, v [B, H, L, D] in one buffer [2, B, L, H, D], as projections lay the heads: one message."""
    pair = k.new_empty(_pair_shape(k))
    for place, x in zip(_unpack(pair), (k, v), strict=True):
        place.copy_(x)
    return pair


def _unpack(pair: Tensor) -> tuple[Tensor, Tensor]:
    return pair.transpose(2, 3).unbind()


def _pair_shape(k: Tensor) -> tuple[int, ...]:
    batch, heads, length, head_dim = k.shape
    return 2, batch, length, heads, head_dim


# -------------------------------------------------------------------------------------------------------- the kernels


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [B, H, L, D].
        lse: the logarithm of each softmax's denominator, [B, H, L]; fp32 at least.
        random_state: what the kernel's backward wants of its forward's dropout, of which there is none.
    """

    out: Tensor
    lse: Tensor
    random_state: tuple[Tensor, ...] = ()


def merge(a: Partial | None, b: Partial) -> Partial:
    """Attention over the keys of both, in fp32 at least.

    With the weight w = exp(lse_b) / (exp(lse_a) + exp(lse_b)): out = (1 - w) out_a + w out_b.
    """
    if a is None:
        return b
    weight = torch.sigmoid(b.lse - a.lse).unsqueeze(-1)  # [B, H, L, 1]
    # not in place: what a kernel returned may be kept by selective recomputation
    out = torch.lerp(a.out.to(weight.dtype), b.out.to(weight.dtype), weight)
    return Partial(out, torch.logaddexp(a.lse, b.lse), a.random_state)


class Kernel(NamedTuple):
    """Attention over a block of keys, q [B, H, L, D] and k, v [B, H, L_b, D], none of them empty.

    Attributes:
        forward: (q, k, v, scale) -> Partial.
        backward: (grad, q, k, v, merged, scale) -> (dq, dk, dv): the block's part of the gradients, where `grad` is
            that of `merged.out`, the attention over all keys.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], Partial]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Partial, float], tuple[Tensor, Tensor, Tensor]]


def choose_kernel(q: Tensor) -> Kernel:
    """The fastest kernel that takes heads like `q`'s: torch knows what its kernels for CUDA can do on which device, and
    what `torch.nn.attention.sdpa_kernel` allows."""
    if q.device.type == "cpu":
        return CPU_FLASH
    if q.is_cuda:
        heads = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
        if torch.backends.cuda.can_use_flash_attention(heads):
            return FLASH
        if torch.backends.cuda.can_use_efficient_attention(heads):
            return EFFICIENT
    return MATH


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    return Partial(*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale))


def _cpu_flash_backward(grad, q, k, v, merged: Partial, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, merged.out, merged.lse, 0.0, False, scale=scale
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    out, lse, _, _, _, _, *random_state, _ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return Partial(out, lse, tuple(random_state))


def _flash_backward(grad, q, k, v, merged: Partial, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, merged.out, merged.lse, None, None, q.shape[2], k.shape[2], 0.0, False,
        *merged.random_state, scale=scale,
    )  # fmt: skip


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    out, lse, *random_state = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return Partial(out, lse[..., : q.shape[2]], tuple(random_state))


def _efficient_backward(grad, q, k, v, merged: Partial, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # rows that there are not: the probability exp(score - lse) of everything in them is 0
    lse = F.pad(merged.lse, (0, -q.shape[2] % EFFICIENT_LSE_MULTIPLE), value=torch.inf)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, merged.out, lse, *merged.random_state, 0.0, [True, True, True, False], scale=scale
    )[:3]


def _math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT) * scale  # [B, H, L, L_b]
    lse = scores.logsumexp(-1)
    return Partial((scores - lse.unsqueeze(-1)).exp() @ v.to(wide), lse)


def _math_backward(grad, q, k, v, merged: Partial, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, merged.out))
    probabilities = ((q @ k.mT) * scale - merged.lse.unsqueeze(-1)).exp()  # [B, H, L, L_b]
    d_scores = probabilities * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return d_scores @ k, d_scores.mT @ q, probabilities.mT @ grad


CPU_FLASH = Kernel(_cpu_flash_forward, _cpu_flash_backward)
FLASH = Kernel(_flash_forward, _flash_backward)  # CUDA, fp16 and bf16
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)  # CUDA, fp32 too
MATH = Kernel(_math_forward, _math_backward)  # whatever torch's others do not take; holds the scores of a block
