"""HunyuanVideo's causal video autoencoder, through diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.models.autoencoder.frame_causal import attend_by_frame
from opensora.models.autoencoder.kl import KLAutoencoder
from opensora.models.autoencoder.loading import build_loaded
from opensora.models.autoencoder.tiles import TileSize, map_tiles
from opensora.registry import AUTOENCODERS

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

SPATIAL = 8
TEMPORAL = 4
LEVELS = 4


@AUTOENCODERS.register("hunyuan_vae")
class HunyuanVAE(KLAutoencoder):
    """4 x 8 x 8 compression with causal convolutions; a latent is 0.476986 * z (Kong et al. 2024, HunyuanVideo).

    A frame's convolutions see earlier frames only, but each group normalisation spans all frames of the clip, so that
    a clip can't be coded in pieces of time without changing the result, and its memory grows with its length:
    `use_temporal_tiling` trades exactness for it.

    Tiles overlap by a quarter and are blended linearly, in the latents the posterior's moments.

    Args:
        from_pretrained: a file or folder with the weights, loaded strictly, or "owner/repository/file" of the Hugging
            Face hub; None: random weights.
        in_channels, out_channels: of the pixels. latent_channels: of the latents.
        layers_per_block: residual blocks of a level; the decoder has one more.
        use_spatial_tiling: code frames that are higher or wider than `sample_size` in tiles.
        use_temporal_tiling: code clips of more than `sample_tsize` frames in tiles of one frame more.
        block_out_channels: of the four levels. norm_num_groups: of the group normalisations.
        sample_size, sample_tsize: of a tile, in pixels (a multiple of 32) and frames (a multiple of 16).
        scale_factor, shift_factor: latents are scale_factor * (z - shift_factor).
        micro_batch_pixels: clips, or tiles where there are some, of one size are coded together up to so many pixels
            (frames x height x width), and at least one, so that memory does not grow with the batch; None: as many
            as the batch has clips.
        compile: compile each normalisation with its activation (torch.compile), for all sizes at once.
    """

    spatial_compression = SPATIAL
    temporal_compression = TEMPORAL
    is_causal = True

    def __init__(
        self,
        from_pretrained: str | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        layers_per_block: int = 2,
        latent_channels: int = 16,
        use_spatial_tiling: bool = False,
        use_temporal_tiling: bool = False,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        norm_num_groups: int = 32,
        sample_size: int = 256,
        sample_tsize: int = 64,
        scale_factor: float = 0.476986,
        shift_factor: float = 0.0,
        micro_batch_pixels: int | None = 2**22,
        compile: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        _check_channels(block_out_channels, norm_num_groups)
        _check_tiles(sample_size, sample_tsize)

        def make() -> AutoencoderKLHunyuanVideo:
            from diffusers import AutoencoderKLHunyuanVideo

            return AutoencoderKLHunyuanVideo(
                in_channels=in_channels,
                out_channels=out_channels,
                latent_channels=latent_channels,
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
            )

        super().__init__(
            build_loaded(make, from_pretrained, "hunyuan_vae", dtype, device),
            scale_factor=scale_factor,
            shift_factor=shift_factor,
            micro_batch_pixels=micro_batch_pixels,
            compile=compile,
        )
        self.latent_channels = latent_channels
        self.tile = TileSize(sample_size if use_spatial_tiling else None, sample_tsize if use_temporal_tiling else None)
        self.latent_tile = self.tile.compressed(SPATIAL, TEMPORAL)
        attend_by_frame(self.vae)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of a video -> those of its latents; frames beyond 4n + 1 don't come back."""
        frames, height, width = size
        if height % SPATIAL or width % SPATIAL:
            raise ValueError(
                f"frames of {height} x {width} pixels do not fit the autoencoder: give multiples of {SPATIAL}"
            )
        return (frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL

    def moments(self, video: Tensor) -> Tensor:
        encode = lambda clips: self.vae.quant_conv(self.vae.encoder(clips))  # noqa: E731
        work = self.over_items(encode, lambda *size: math.prod(size), unlimited=len(video))
        return map_tiles(work, video, self.tile, self.latent_tile)

    def reconstruct(self, z: Tensor) -> Tensor:
        decode = lambda clips: self.vae.decoder(self.vae.post_quant_conv(clips))  # noqa: E731
        work = self.over_items(decode, _pixels_of_latents, unlimited=len(z))
        return map_tiles(work, z, self.latent_tile, self.tile)


def _pixels_of_latents(frames: int, height: int, width: int) -> int:
    return (TEMPORAL * (frames - 1) + 1) * SPATIAL**2 * height * width


def _check_channels(block_out_channels: Sequence[int], norm_num_groups: int) -> None:
    if norm_num_groups < 1:
        raise ValueError(f"norm_num_groups={norm_num_groups} must be at least 1")
    if len(block_out_channels) != LEVELS or any(n < 1 or n % norm_num_groups for n in block_out_channels):
        raise ValueError(
            f"block_out_channels={list(block_out_channels)} must be {LEVELS} multiples of "
            f"norm_num_groups={norm_num_groups}"
        )


def _check_tiles(sample_size: int, sample_tsize: int) -> None:
    for name, value, unit in (("sample_size", sample_size, 4 * SPATIAL), ("sample_tsize", sample_tsize, 4 * TEMPORAL)):
        if value < unit or value % unit:
            raise ValueError(f"{name}={value} must be a multiple of {unit}: a quarter of a tile is whole latents")
