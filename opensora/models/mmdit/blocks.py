"""The blocks of the MMDiT: two streams that attend to each other, one merged stream, and the way out.

Heads are kept as [B, L, H, D] up to the attention, so that joining text and image tokens and reading the projections
copies as little as possible; the attention sees them as [B, H, L, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models.attention import attention
from opensora.models.mmdit.layers import Modulation, QKNorm, modulate
from opensora.models.mmdit.rotary import RotaryTable, rotate_half, rotate_interleaved


class BlockShape(NamedTuple):
    """What all blocks of a model have in common."""

    hidden_size: int
    num_heads: int
    mlp_size: int
    qkv_bias: bool  # of the double blocks; the single blocks' projections always have one
    fused_qkv: bool
    interleaved: bool  # the form of the rotary embedding


class StreamAttention(nn.Module):
    """One stream's projections into and out of the joint attention, and its q/k norms."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        hidden = shape.hidden_size
        self.num_heads = shape.num_heads
        self.fused_qkv = shape.fused_qkv
        if shape.fused_qkv:
            self.qkv = nn.Linear(hidden, 3 * hidden, bias=shape.qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, hidden, bias=shape.qkv_bias)
            self.k_proj = nn.Linear(hidden, hidden, bias=shape.qkv_bias)
            self.v_proj = nn.Linear(hidden, hidden, bias=shape.qkv_bias)
        self.norm = QKNorm(hidden // shape.num_heads)
        self.proj = nn.Linear(hidden, hidden)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] -> normed q, normed k, v, each [B, L, H, D]."""
        if self.fused_qkv:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        else:
            q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return *self.norm(q, k), v


def _mlp(hidden: int, mlp_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp_size), nn.GELU(approximate="tanh"), nn.Linear(mlp_size, hidden))


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, one attention over both."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        hidden = shape.hidden_size
        self.img_mod = Modulation(hidden, count=6)
        self.img_attn = StreamAttention(shape)
        self.img_mlp = _mlp(hidden, shape.mlp_size)
        self.txt_mod = Modulation(hidden, count=6)
        self.txt_attn = StreamAttention(shape)
        self.txt_mlp = _mlp(hidden, shape.mlp_size)
        self.rotate = rotate_interleaved if shape.interleaved else rotate_half
        self.attention = attention

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """img [B, L, hidden], txt [B, S, hidden], vec [B, hidden], table over S+L positions -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_heads = self.img_attn.heads(modulate(img, img_shift1, img_scale1))
        txt_heads = self.txt_attn.heads(modulate(txt, txt_shift1, txt_scale1))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_heads, img_heads, strict=True))  # [B, S+L, H, D]
        q, k = self.rotate(q, table), self.rotate(k, table)
        joint = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, S+L, hidden]
        txt_joint, img_joint = joint.split([txt.shape[1], img.shape[1]], dim=1)  # [B, S, hidden], [B, L, hidden]

        # addcmul is the gated residual x + gate * update in one pass
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_joint))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_joint))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image tokens as one sequence; attention and MLP side by side."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        self.hidden_size = hidden = shape.hidden_size
        self.mlp_size = mlp_size = shape.mlp_size
        self.num_heads = shape.num_heads
        self.fused_qkv = shape.fused_qkv
        if shape.fused_qkv:
            self.linear1 = nn.Linear(hidden, 3 * hidden + mlp_size)
        else:
            self.q_proj = nn.Linear(hidden, hidden)
            self.k_proj = nn.Linear(hidden, hidden)
            self.v_mlp = nn.Linear(hidden, hidden + mlp_size)
        self.linear2 = nn.Linear(hidden + mlp_size, hidden)
        self.norm = QKNorm(hidden // shape.num_heads)
        self.modulation = Modulation(hidden, count=3)
        self.rotate = rotate_interleaved if shape.interleaved else rotate_half
        self.attention = attention

    def heads_and_mlp(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, L, hidden] -> normed q, normed k, v, each [B, L, H, D], and the MLP's input [B, L, mlp_size]."""
        if self.fused_qkv:
            q, k, v, mlp = self.linear1(x).split([self.hidden_size] * 3 + [self.mlp_size], dim=-1)
        else:
            q, k = self.q_proj(x), self.k_proj(x)
            v, mlp = self.v_mlp(x).split([self.hidden_size, self.mlp_size], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        return *self.norm(q, k), v, mlp

    def forward(self, x: Tensor, vec: Tensor, table: RotaryTable) -> Tensor:
        """x [B, S+L, hidden], vec [B, hidden], table over S+L positions -> x."""
        shift, scale, gate = self.modulation(vec)
        q, k, v, mlp = self.heads_and_mlp(modulate(x, shift, scale))
        q, k = self.rotate(q, table), self.rotate(k, table)
        attended = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, S+L, hidden]
        activated = F.gelu(mlp, approximate="tanh")
        return torch.addcmul(x, gate, self.linear2(torch.cat([attended, activated], dim=-1)))


class FinalLayer(nn.Module):
    """Tokens -> patches, after a norm that the conditioning shifts and scales."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x [B, L, hidden], vec [B, hidden] -> [B, L, out_channels]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # [B, 1, hidden] each
        return self.linear(modulate(x, shift, scale))
