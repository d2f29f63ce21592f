"""Sequence parallelism: the ranks of a group hold a part of the tokens each, text and image tokens alike.

All of the MMDiT but its attention works on tokens one by one, so its forward runs as it is on a rank's part. Around it
the tokens are divided and put together again; within, each block's attention is replaced by one over all parts:

    all_to_all  (Ulysses, arXiv:2309.14509) exchanges tokens for heads: each rank attends over all tokens with its
                part of the heads. Heads have to divide.
    ring_attn   (Ring Attention, arXiv:2310.01889) lets keys and values travel from rank to rank.

Parts may differ by a token, so any length can be divided, and none is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora.models.attention import Attention
from opensora.models.mmdit import MMDiT
from opensora.parallel.collectives import exchange, gather_tokens
from opensora.parallel.context import RankGroup
from opensora.parallel.ring import ring_attention

MODES = ("all_to_all", "ring_attn")


def split_sequence(model: MMDiT, group: RankGroup, mode: str) -> None:
    """Let the ranks of `group` share the tokens of each forward pass; inputs and outputs stay those of the whole.

    Call it once, before compilation and recomputation, after an attention has been selected.

    mode: one of MODES.
    """
    if group.size == 1:
        return
    lengths = [0] * group.size  # tokens of each rank in the present forward pass
    for block in (*model.double_blocks, *model.single_blocks):
        attend = partial(_attend_in_ring, group, lengths)
        if mode == "all_to_all":
            attend = partial(_attend_by_heads, block.attention, group, lengths)
        block.attention = torch.compiler.disable(attend)  # a graph can't wait for other ranks
    # on the instance: wrapping the module would put a name before its parameters'
    model.forward = partial(_forward_parts, model.forward, group, lengths)


def _forward_parts(forward, group: RankGroup, lengths: list[int], **inputs: Any) -> Tensor:
    """`forward` of the whole model on this rank's tokens. Text's odd tokens go to the first ranks, image's to the last,
    so that no rank has more than one token more than another."""
    image = divide(inputs["img"].shape[1], group.size)[::-1]
    text = divide(inputs["txt"].shape[1], group.size)
    lengths[:] = [sum(pair) for pair in zip(image, text, strict=True)]
    for names, parts in ((("img", "img_ids", "cond"), image), (("txt", "txt_ids"), text)):
        for name in names:
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].split(parts, dim=1)[group.rank]
    return gather_tokens(forward(**inputs), group, image)


def divide(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by at most one, larger ones first."""
    least, more = divmod(count, parts)
    return [least + (part < more) for part in range(parts)]


def _attend_by_heads(
    attend: Attention, group: RankGroup, lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """q, k, v [B, H, L_rank, D] of this rank's tokens -> [B, L_rank, H*D]."""
    lengths = tuple(lengths)  # of this forward pass: the backward one may come after another's
    batch, _, length, _ = q.shape
    heads = torch.stack([q, k, v]).unflatten(2, (group.size, -1))  # [3, B, ranks, H/ranks, L_rank, D]
    rows = heads.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # [ranks * L_rank, 3, B, H/ranks, D]
    rows = exchange(rows, group, [length] * group.size, lengths)  # [L, 3, B, H/ranks, D]
    out = attend(*rows.permute(1, 2, 3, 0, 4))  # [B, L, H/ranks * D]
    rows = exchange(out.transpose(0, 1), group, lengths, [length] * group.size)  # [ranks * L_rank, B, H/ranks * D]
    return rows.unflatten(0, (group.size, length)).permute(2, 1, 0, 3).reshape(batch, length, -1)


def _attend_in_ring(group: RankGroup, lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ring_attention(q, k, v, group.process_group, tuple(lengths))
