"""The multimodal diffusion transformer of Open-Sora 2.0 and flux-dev.

Names, shapes and order of the parameters are those of the published weights (tests/golden/manifests).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opensora.models.mmdit.blocks import BlockShape, DoubleStreamBlock, FinalLayer, SingleStreamBlock
from opensora.models.mmdit.layers import MLPEmbedder, timestep_embedding
from opensora.models.mmdit.rotary import RotaryTable, rotary_table
from opensora.registry import MODELS

TIME_DIM = 256  # of the sinusoidal embeddings of the timestep and the guidance


@MODELS.register("flux")
class MMDiT(nn.Module):
    """Predicts the velocity of noised video tokens, given text tokens, a text vector and the timestep.

    Args (those of a config's `model`):
        in_channels: channels of an image token, latent channels * patch_size².
        vec_in_dim, context_in_dim: widths of the text vector (CLIP) and of the text tokens (T5).
        hidden_size, num_heads, mlp_ratio: of all blocks. depth, depth_single_blocks: double and single blocks.
        axes_dim, theta: rotary dimensions of (frame, row, column), which add up to the head's, and their base.
        qkv_bias: of the double blocks' q, k, v. guidance_embed: condition on a distilled guidance strength.
        cond_embed: take conditioning tokens (mask and masked latents, in_channels + patch_size² channels).
        fused_qkv: q, k, v (and the single blocks' MLP) in one linear, as flux's files have them.
        use_liger_rope: rotary planes (d, D/2+d), Open-Sora's form, else (2d, 2d+1), flux's.
    """

    def __init__(
        self,
        in_channels: int,
        vec_in_dim: int,
        context_in_dim: int,
        hidden_size: int,
        mlp_ratio: float,
        num_heads: int,
        depth: int,
        depth_single_blocks: int,
        axes_dim: Sequence[int],
        theta: int,
        qkv_bias: bool,
        guidance_embed: bool,
        cond_embed: bool = False,
        fused_qkv: bool = True,
        use_liger_rope: bool = False,
        patch_size: int = 2,
    ):
        super().__init__()
        _check_heads(hidden_size, num_heads, axes_dim)
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.axes_dim = tuple(axes_dim)
        self.theta = theta
        self.guidance_embed = guidance_embed
        self.cond_embed = cond_embed
        self.fused_qkv = fused_qkv
        self.interleaved = not use_liger_rope
        shape = BlockShape(
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_size=int(hidden_size * mlp_ratio),
            qkv_bias=qkv_bias,
            fused_qkv=fused_qkv,
            interleaved=self.interleaved,
        )

        self.img_in = nn.Linear(in_channels, hidden_size)
        self.time_in = MLPEmbedder(TIME_DIM, hidden_size)
        self.vector_in = MLPEmbedder(vec_in_dim, hidden_size)
        if guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_DIM, hidden_size)
        if cond_embed:
            self.cond_in = nn.Linear(in_channels + patch_size**2, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(shape) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(shape) for _ in range(depth_single_blocks))
        self.final_layer = FinalLayer(hidden_size, in_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity of each image token, [B, L, in_channels].

        Args:
            img: noised tokens [B, L, in_channels]. img_ids: their (frame, row, column) [B, L, 3].
            txt: text tokens [B, S, context_in_dim]. txt_ids: zeros [B, S, 3].
            timesteps: [B] in [0, 1], 1 is noise. y_vec: text vector [B, vec_in_dim].
            cond: conditioning tokens [B, L, in_channels + patch_size²]; needed with cond_embed, else not looked at.
            guidance: [B]; needed with guidance_embed, else not looked at.
        """
        vec = self.time_in(timestep_embedding(timesteps, TIME_DIM).to(img.dtype)) + self.vector_in(y_vec)  # [B, hidden]
        if self.guidance_embed:
            _require(guidance, "guidance", "guidance_embed")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_DIM).to(img.dtype))

        img = self.img_in(img)  # [B, L, hidden]
        if self.cond_embed:
            _require(cond, "cond", "cond_embed")
            img = img + self.cond_in(cond)
        txt = self.txt_in(txt)  # [B, S, hidden]
        table = self.rotary_table(torch.cat([txt_ids, img_ids], dim=1))  # of S+L positions

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, table)
        x = torch.cat([txt, img], dim=1)  # [B, S+L, hidden]
        for block in self.single_blocks:
            x = block(x, vec, table)
        return self.final_layer(x[:, txt.shape[1] :], vec)  # [B, L, in_channels]

    def rotary_table(self, ids: Tensor) -> RotaryTable:
        """Cosines and sines for position ids [B, L, 3]; flux's form takes its angles in fp64, Open-Sora's in fp32."""
        return rotary_table(ids, self.axes_dim, self.theta, torch.float64 if self.interleaved else torch.float32)


def _require(value: Tensor | None, name: str, setting: str) -> None:
    if value is None:
        raise ValueError(f"the model was built with model.{setting}=True and was called without `{name}`: pass it")


def _check_heads(hidden_size: int, num_heads: int, axes_dim: Sequence[int]) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"model.hidden_size={hidden_size} is not divisible by model.num_heads={num_heads}")
    if sum(axes_dim) != hidden_size // num_heads or any(dim % 2 for dim in axes_dim):
        raise ValueError(
            f"model.axes_dim={list(axes_dim)} must be even numbers that add up to hidden_size / num_heads = "
            f"{hidden_size // num_heads}"
        )
