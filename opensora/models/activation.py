"""Activation checkpointing: blocks that keep their inputs only and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from opensora.models.mmdit import MMDiT


def checkpoint_blocks(model: MMDiT, setting: tuple[int, int] | None) -> None:
    """Recompute the first `double` double blocks and the first `single` single blocks in the backward pass.

    Parameters keep their names, gradients their values. A second call replaces the first.

    Args:
        setting: (double, single), the config's `grad_ckpt_settings`; more than there are means all, None all blocks.

    Raises:
        ValueError: `setting` is not two counts.
    """
    double, single = _counts(setting, model)
    for blocks, count in ((model.double_blocks, double), (model.single_blocks, single)):
        for index, block in enumerate(blocks):
            block.__dict__.pop("forward", None)
            if index < count:
                # on the instance: wrapping the module would put a name before its parameters'
                block.forward = partial(_recompute, block.forward)


def _recompute(forward: Callable, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def _counts(setting: tuple[int, int] | None, model: MMDiT) -> tuple[int, int]:
    if setting is None:
        return len(model.double_blocks), len(model.single_blocks)
    if len(setting) != 2 or any(not isinstance(count, int) or count < 0 for count in setting):
        raise ValueError(
            f"model.grad_ckpt_settings={setting} must be two counts, of double and of single blocks, e.g. (8, 100)"
        )
    return setting[0], setting[1]
