"""Attention of each latent frame over itself and those before it, without a mask.

The mid blocks of HunyuanVideo's autoencoder attend over all positions of a clip, frame-causally. diffusers gives them a
mask of [T*H*W, T*H*W], which is 2 GB in bf16 for 129 frames of 256 x 256 pixels and 8 GB while it is made. Frame by
frame, each over the keys up to its own last one, is the same softmax without it, and half the products.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend_by_frame(vae: nn.Module) -> None:
    """Let the mid blocks of an AutoencoderKLHunyuanVideo attend without a mask. Parameters keep their names."""
    for part in (vae.encoder, vae.decoder):
        part.mid_block.forward = partial(_mid_block, part.mid_block)


def _mid_block(block: nn.Module, x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> the same: residual blocks with attention between them."""
    x = block.resnets[0](x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = resnet(x if attention is None else frame_causal_attention(attention, x))
    return x


def frame_causal_attention(layer: nn.Module, x: Tensor) -> Tensor:
    """x [B, C, T, H, W] and its attention by the weights of a diffusers `Attention`, added up."""
    frame = x.shape[3] * x.shape[4]
    tokens = layer.group_norm(x.flatten(2)).transpose(1, 2)  # [B, T*H*W, C]
    q, k, v = (
        f(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v)
    )  # [B, heads, T*H*W, D]
    frames = [
        F.scaled_dot_product_attention(q[:, :, end - frame : end], k[:, :, :end], v[:, :, :end])
        for end in range(frame, q.shape[2] + 1, frame)
    ]
    attended = torch.cat(frames, dim=2).transpose(1, 2).flatten(2)  # [B, T*H*W, C]
    return x + layer.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[2:])
