"""Collectives that gradients pass through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from opensora.parallel.context import RankGroup


class _EnterSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_over(grad, ctx.group), None


class _LeaveSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchanged(x, group, send, receive)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _exchanged(grad, ctx.group, ctx.receive, ctx.send), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: RankGroup, lengths: Sequence[int]) -> Tensor:
        ctx.group, ctx.lengths = group, lengths
        batch, _, features = x.shape
        longest = max(lengths)
        padded = x.new_zeros(batch, longest, features)
        padded[:, : x.shape[1]] = x
        found = x.new_empty(group.size * batch, longest, features)
        dist.all_gather_into_tensor(found, padded, group=group.process_group)
        parts = found.unflatten(0, (group.size, batch))
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        mine = grad.split(list(ctx.lengths), dim=1)[ctx.group.rank]
        return mine * ctx.group.size, None, None


def enter_split(x: Tensor, group: RankGroup) -> Tensor:
    """`x`, equal on all ranks, where layers begin of which each rank has a part: their gradients are summed."""
    return _EnterSplit.apply(x, group)


def leave_split(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of all ranks' `x`, where such layers end."""
    return _LeaveSplit.apply(x, group)


def exchange(x: Tensor, group: RankGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Rows to all ranks and from all: x [sum(send), ...] -> [sum(receive), ...], in the order of ranks."""
    return _Exchange.apply(x, group, send, receive)


def gather_tokens(x: Tensor, group: RankGroup, lengths: Sequence[int]) -> Tensor:
    """Every rank's tokens: x [B, lengths[rank], D] -> [B, sum(lengths), D].

    The ranks then compute one loss over all tokens, and its gradient comes back `group.size` times as large: each
    rank's parameters see their own tokens only, and data parallelism takes the mean over these ranks, not the sum.
    """
    return _Gather.apply(x, group, lengths)


def sum_over(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of all ranks' `x`, of which no gradient is taken."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.process_group)
    return total


def _exchanged(x: Tensor, group: RankGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    found = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), list(receive), list(send), group=group.process_group)
    return found
