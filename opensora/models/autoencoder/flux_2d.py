"""FLUX.1's image autoencoder, through diffusers, and the names that its weights have in either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.models.autoencoder.kl import KLAutoencoder
from opensora.models.autoencoder.loading import build_loaded
from opensora.models.weight_files import WeightSource
from opensora.registry import AUTOENCODERS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SPATIAL = 8
LEVELS = 4
GROUPS = 32  # of the group normalisations


@AUTOENCODERS.register("autoencoder_2d")
class Autoencoder2D(KLAutoencoder):
    """8 x 8 compression, each frame on its own; a latent is scale_factor * (z - shift_factor).

    Args:
        from_pretrained: a file or folder with the weights, under their original names (flux1-dev-ae.safetensors) or
            under diffusers', loaded strictly, or "owner/repository/file" of the Hugging Face hub; None: random weights.
        resolution: of the images that it was trained on: changes nothing.
        in_channels, out_ch: of the pixels. z_channels: of the latents.
        ch, ch_mult: channels of the first level, and of all four as multiples of it.
        num_res_blocks: residual blocks of a level; the decoder has one more.
        micro_batch_pixels: frames are coded in groups of at most so many pixels and at least one frame, so that memory
            does not grow with the batch or the length; None: all at once.
        compile: compile each normalisation with its activation (torch.compile), for all sizes at once.
    """

    spatial_compression = SPATIAL
    temporal_compression = 1
    is_causal = False

    def __init__(
        self,
        from_pretrained: str | None = None,
        resolution: int = 256,
        in_channels: int = 3,
        ch: int = 128,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 16,
        scale_factor: float = 0.3611,
        shift_factor: float = 0.1159,
        micro_batch_pixels: int | None = 2**22,
        compile: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if len(ch_mult) != LEVELS or any(multiple < 1 for multiple in ch_mult):
            raise ValueError(f"ch_mult={list(ch_mult)} must be {LEVELS} numbers of at least 1")
        if ch < GROUPS or ch % GROUPS:
            raise ValueError(f"ch={ch} must be a multiple of {GROUPS}")

        def make() -> AutoencoderKL:
            from diffusers import AutoencoderKL

            return AutoencoderKL(
                in_channels=in_channels,
                out_channels=out_ch,
                latent_channels=z_channels,
                block_out_channels=tuple(ch * multiple for multiple in ch_mult),
                layers_per_block=num_res_blocks,
                down_block_types=("DownEncoderBlock2D",) * LEVELS,
                up_block_types=("UpDecoderBlock2D",) * LEVELS,
                norm_num_groups=GROUPS,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )

        rename = partial(to_diffusers, num_res_blocks=num_res_blocks)
        super().__init__(
            build_loaded(make, from_pretrained, "autoencoder_2d", dtype, device, rename),
            scale_factor=scale_factor,
            shift_factor=shift_factor,
            micro_batch_pixels=micro_batch_pixels,
            compile=compile,
        )
        self.latent_channels = z_channels

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of a video -> those of its latents: as many frames."""
        frames, height, width = size
        if height % SPATIAL or width % SPATIAL:
            raise ValueError(
                f"frames of {height} x {width} pixels do not fit the autoencoder: give multiples of {SPATIAL}"
            )
        return frames, height // SPATIAL, width // SPATIAL

    def moments(self, video: Tensor) -> Tensor:
        encode = lambda frames: self.vae.encode(frames).latent_dist.parameters  # noqa: E731
        return self._by_frame(encode, video, lambda height, width: height * width)

    def reconstruct(self, z: Tensor) -> Tensor:
        decode = lambda frames: self.vae.decode(frames).sample  # noqa: E731
        return self._by_frame(decode, z, lambda height, width: SPATIAL**2 * height * width)

    def _by_frame(
        self, network: Callable[[Tensor], Tensor], video: Tensor, pixels: Callable[[int, int], int]
    ) -> Tensor:
        frames = video.transpose(1, 2).flatten(0, 1)  # [B, C, T, H, W] -> [B*T, C, H, W]
        results = self.over_items(network, pixels, unlimited=len(frames))(frames.split(1))
        return torch.cat(results).unflatten(0, (len(video), -1)).transpose(1, 2)  # -> [B, C', T, h, w]


# ------------------------------------------------------------------------------------------------------- names


def to_diffusers(source: WeightSource, num_res_blocks: int = 2) -> WeightSource:
    """Weights under their original names (spec/manifests/flux_ae) -> under diffusers'; those that have them stay."""
    return _renamed(source, module_names(num_res_blocks))


def to_original(source: WeightSource, num_res_blocks: int = 2) -> WeightSource:
    """The way back from `to_diffusers`."""
    return _renamed(source, {ours: theirs for theirs, ours in module_names(num_res_blocks).items()})


ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def module_names(num_res_blocks: int) -> dict[str, str]:
    """The original's modules -> diffusers': how their weights' names begin. The others have the same names in both."""
    names = {}
    for level in range(LEVELS):
        up = LEVELS - 1 - level  # the original counts the decoder's levels from the last one that runs
        for block in range(num_res_blocks):
            names[f"encoder.down.{level}.block.{block}"] = f"encoder.down_blocks.{level}.resnets.{block}"
        for block in range(num_res_blocks + 1):
            names[f"decoder.up.{level}.block.{block}"] = f"decoder.up_blocks.{up}.resnets.{block}"
        names[f"encoder.down.{level}.downsample"] = f"encoder.down_blocks.{level}.downsamplers.0"
        names[f"decoder.up.{level}.upsample"] = f"decoder.up_blocks.{up}.upsamplers.0"
    names |= {f"{old}.nin_shortcut": f"{new}.conv_shortcut" for old, new in names.items() if ".block." in old}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.mid.block_{block + 1}": f"{side}.mid_block.resnets.{block}" for block in range(2)}
        names |= {f"{side}.mid.attn_1.{old}": f"{side}.mid_block.attentions.0.{new}" for old, new in ATTENTION.items()}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
    return names


def _renamed(source: WeightSource, modules: Mapping[str, str]) -> WeightSource:
    origin = {_translate(name, modules): name for name in source.shapes}
    shapes = {name: _attention_shape(name, source.shapes[old]) for name, old in origin.items()}

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = source.read([origin[name] for name in names])
        return {name: tensors[origin[name]].reshape(shapes[name]) for name in names}

    dtypes = {name: source.dtypes[old] for name, old in origin.items()}
    return replace(source, shapes=shapes, dtypes=dtypes, read=read)


def _translate(name: str, modules: Mapping[str, str]) -> str:
    """`name` with the longest beginning that `modules` has replaced."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            return ".".join([modules[module], *parts[end:]])
    return name


def _attention_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The attention's projections are 1 x 1 convolutions in the original and linear layers in diffusers."""
    if ".mid.attn_1." in name and len(shape) == 2:
        return (*shape, 1, 1)
    if ".mid_block.attentions." in name and shape[2:] == (1, 1):
        return shape[:2]
    return shape
