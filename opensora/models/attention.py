"""Attention as one callable. A block holds it as `self.attention`; sequence parallelism puts another in its place."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.registry import nearest

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over all positions, heads side by side: q, k, v [B, H, L, D] -> [B, L, H*D].

    torch picks the kernel (flash, cuDNN or plain, on CPU and CUDA). The kernels read strided heads, so callers pass
    `[B, L, H, D].transpose(1, 2)` without copying, and write [B, L, H, D], so that the last line copies nothing either.
    """
    # torch's order of kernels stays: on Hopper its newer versions take cuDNN first by themselves, older ones flash. No
    # order is best for all shapes, and cuDNN plans each (batch, length) anew, which many buckets pay for many times.
    out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, D]
    return out.transpose(1, 2).flatten(2)  # [B, L, H*D]


class FlashPackage(NamedTuple):
    """A package of flash-attention's: its module with `flash_attn_func`, the namespace of its operators, its source."""

    module: str
    operators: str
    install: str


FLASH = {
    "flash_attn_2": FlashPackage("flash_attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": FlashPackage(
        "flash_attn_interface",
        "flash_attn_3",
        "python setup.py install in hopper/ of Dao-AILab/flash-attention",
    ),
}
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # at most, and a multiple of 8: others are padded, which copies, or refused


def select_attention(model: nn.Module, name: str = "sdpa", where: str = "model") -> None:
    """Put the attention that `name` means, "sdpa" or one of FLASH, on every block of an MMDiT.

    where: the model's place in the config, for messages.

    Raises:
        ValueError: the name is unknown, or its package is not there or does not load.
    """
    chosen = attention if name == "sdpa" else flash_attention(name, where)
    for block in (*model.double_blocks, *model.single_blocks):
        block.attention = chosen


def flash_attention(name: str, where: str = "model") -> Attention:
    """`attention` by one of flash-attention's own packages: fp16 or bf16 on CUDA."""
    if name not in FLASH:
        raise ValueError(f"{where}.attention='{name}' is unknown{nearest(name, ('sdpa', *FLASH))}")
    package = FLASH[name]
    try:
        flash_attn_func = importlib.import_module(package.module).flash_attn_func
    except (ImportError, OSError, AttributeError) as error:  # not there, or built for another torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{where}.attention='{name}': {package.module} can't be imported ({reason}): build it for "
            f"torch {torch.__version__} ({package.install}), or set --{where}.attention sdpa"
        ) from error
    if not hasattr(getattr(torch.ops, package.operators), "_flash_attn_forward"):
        # a release from before its kernels were operators, which torch.compile can't look into: it leaves a gap
        flash_attn_func = torch.compiler.disable(flash_attn_func)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # its layout is [B, L, H, D], which the heads have in memory: transposing back copies nothing
        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out[0] if isinstance(out, tuple) else out  # some releases of 3 return the log-sum-exp too
        return out.flatten(2)  # [B, L, H*D]

    return attend


def why_not_attention(name: str, head_dim: int, dtype: torch.dtype, has_cuda: bool, where: str = "model") -> str | None:
    """Why the attention that `name` means can't be had, and what to do; None if it can. Nothing is imported.

    Args:
        head_dim, dtype: of the model. has_cuda: whether it runs on a CUDA device.
        where: the model's place in the config.
    """
    if name not in FLASH:
        return None
    package = FLASH[name]
    remedy = f"set --{where}.attention sdpa"
    if not has_cuda:
        return f"{where}.attention='{name}' needs a CUDA device, and PyTorch sees none here: {remedy}"
    if importlib.util.find_spec(package.module) is None:
        return f"{where}.attention='{name}' needs the module {package.module}: {package.install}, or {remedy}"
    if dtype not in FLASH_DTYPES:
        given = str(dtype).removeprefix("torch.")
        return f"{where}.attention='{name}' computes in bf16 or fp16, not in {given}: set --dtype bf16, or {remedy}"
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
        return (
            f"{where}.attention='{name}' takes heads of a multiple of 8 dimensions up to {FLASH_HEAD_DIM}, and "
            f"{where}.axes_dim adds up to {head_dim}: {remedy}"
        )
    return None
