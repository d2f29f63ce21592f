"""HunyuanVideo's causal video autoencoder, through diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.models.autoencoder.frame_causal import attend_by_frame
from opensora.models.autoencoder.kl import KLAutoencoder, in_micro_batches
from opensora.models.autoencoder.loading import build_loaded
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
        micro_batch_pixels: a batch is coded in parts of at most so many pixels (frames x height x width, of a tile
            where there are tiles) and at least one clip, so that memory does not grow with the batch; None: at once.
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
        self.tile_frames = sample_tsize + 1 if use_temporal_tiling else None
        self.tile_size = sample_size if use_spatial_tiling else None
        attend_by_frame(self.vae)
        set_tiles(self.vae, use_spatial_tiling, use_temporal_tiling, sample_size, sample_tsize)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of a video -> those of its latents; frames beyond 4n + 1 don't come back."""
        frames, height, width = size
        if height % SPATIAL or width % SPATIAL:
            raise ValueError(
                f"frames of {height} x {width} pixels do not fit the autoencoder: give multiples of {SPATIAL}"
            )
        return (frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL

    def moments(self, video: Tensor) -> Tensor:
        encode = lambda clips: self.vae.encode(clips).latent_dist.parameters  # noqa: E731
        return in_micro_batches(encode, video, self.micro_batch_pixels, self._pixels_at_once(*video.shape[2:]))

    def reconstruct(self, z: Tensor) -> Tensor:
        decode = lambda latents: self.vae.decode(latents).sample  # noqa: E731
        frames, height, width = z.shape[2:]
        each = self._pixels_at_once(TEMPORAL * (frames - 1) + 1, SPATIAL * height, SPATIAL * width)
        return in_micro_batches(decode, z, self.micro_batch_pixels, each)

    def _pixels_at_once(self, frames: int, height: int, width: int) -> int:
        """Pixels of a clip that the network sees at once: those of a tile, or all."""
        frames = min(frames, self.tile_frames or frames)
        return frames * min(height, self.tile_size or height) * min(width, self.tile_size or width)


def set_tiles(vae: AutoencoderKLHunyuanVideo, spatial: bool, temporal: bool, size: int, frames: int) -> None:
    """Tell diffusers which tiles to use: by itself it cuts time into tiles of 16 frames.

    These are attributes, which a version that calls them differently would ignore without a word.
    """
    settings = {
        "use_tiling": spatial,
        "use_framewise_encoding": temporal,
        "use_framewise_decoding": temporal,
        "tile_sample_min_num_frames": frames,
        "tile_sample_stride_num_frames": frames * 3 // 4,
    }
    for side in ("height", "width"):
        settings |= {f"tile_sample_min_{side}": size, f"tile_sample_stride_{side}": size * 3 // 4}
    for name, value in settings.items():
        if not hasattr(vae, name):
            raise ImportError(f"diffusers' AutoencoderKLHunyuanVideo has no {name}: install requirements.txt's version")
        setattr(vae, name, value)


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
