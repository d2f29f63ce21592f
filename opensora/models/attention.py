"""Attention as one callable. A block holds it as `self.attention`; sequence parallelism puts another in its place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over all positions, heads side by side: q, k, v [B, H, L, D] -> [B, L, H*D].

    torch picks the kernel (flash, cuDNN or plain, on CPU and CUDA). The kernels read strided heads, so callers pass
    `[B, L, H, D].transpose(1, 2)` without copying, and write [B, L, H, D], so that the last line copies nothing either.
    """
    out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, D]
    return out.transpose(1, 2).flatten(2)  # [B, L, H*D]
