"""Activation checkpointing: blocks that keep their inputs only and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from opensora.models.mmdit import MMDiT

POLICIES = ("full", "blocks", "attention")


def checkpoint_blocks(model: MMDiT, setting: tuple[int, int] | None, policy: str = "blocks") -> list[nn.Module]:
    """Recompute the first `double` double blocks and the first `single` single blocks in the backward pass.

    Parameters keep their names, gradients their values. A second call replaces the first, and undoes whatever else was
    put in place of a block's forward: compile and offload (`offload.py`) afterwards, in this order.

    Args:
        setting: (double, single), the config's `grad_ckpt_settings`; more than there are means all, None all blocks.
        policy: "blocks" recomputes these blocks; "full" all blocks, whatever the setting; "attention" these blocks but
            for their attention, whose output and log-sum-exp are kept.

    Returns:
        The blocks that are recomputed, in the order of the forward pass.

    Raises:
        ValueError: `setting` is not two counts, or `policy` is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"model.grad_ckpt_policy='{policy}' is unknown: one of {', '.join(POLICIES)}")
    double, single = _counts(None if policy == "full" else setting, model)
    for block in (*model.double_blocks, *model.single_blocks):
        block.__dict__.pop("forward", None)
    chosen = [*model.double_blocks[:double], *model.single_blocks[:single]]
    options = {"context_fn": _keep_attention} if policy == "attention" else {}
    for block in chosen:
        # on the instance: wrapping the module would put a name before its parameters'
        block.forward = partial(_recompute, block.forward, options)
    return chosen


def _recompute(forward: Callable, options: dict[str, Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, **options)


def _keep_attention() -> tuple:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


def is_attention(op: Any) -> bool:
    """Whether an operator is an attention kernel: by its name, as each device, version and package has its own.

    aten's all have "attention" in it (`_scaled_dot_product_flash_attention_for_cpu`, `..._cudnn_attention`, ...),
    flash-attn's are in the namespaces `flash_attn` and `flash_attn_3`.
    """
    return any(word in str(op) for word in ("attention", "flash_attn"))


def _counts(setting: tuple[int, int] | None, model: MMDiT) -> tuple[int, int]:
    if setting is None:
        return len(model.double_blocks), len(model.single_blocks)
    if len(setting) != 2 or any(not isinstance(count, int) or count < 0 for count in setting):
        raise ValueError(
            f"model.grad_ckpt_settings={setting} must be two counts, of double and of single blocks, e.g. (8, 100)"
        )
    return setting[0], setting[1]
