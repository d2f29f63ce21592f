"""The autoencoders of the 11B models: their settings and sizes, so that configs that name them parse and are checked.

Both come with a later version; `Registry.require_available` says so before a device or data is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from opensora.registry import AUTOENCODERS

REASON = (
    "until it is, use the linear autoencoder of the demo, "
    "--ae \"dict(type='linear_causal', from_pretrained='ckpts/shapes/ae.safetensors')\""
)


@AUTOENCODERS.plan("hunyuan_vae", REASON)
class HunyuanVAE:
    """HunyuanVideo's causal VAE; a latent is 0.476986 * sample (spec 3).

    Args:
        from_pretrained: a .safetensors file, loaded strictly.
        use_spatial_tiling: encode and decode in overlapping tiles of 256 pixels.
        use_temporal_tiling: and of 64 frames.
    """

    spatial_compression, temporal_compression, is_causal = 8, 4, True

    def __init__(
        self,
        from_pretrained: str | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        layers_per_block: int = 2,
        latent_channels: int = 16,
        use_spatial_tiling: bool = False,
        use_temporal_tiling: bool = False,
    ): ...


@AUTOENCODERS.plan("autoencoder_2d", REASON)
class Autoencoder2D:
    """flux's image autoencoder, a frame at a time; a latent is scale_factor * (sample - shift_factor) (spec 3).

    Args:
        from_pretrained: a .safetensors file.
        ch, ch_mult: channels of the first level, and of all as multiples of it.
        z_channels: of the latents.
    """

    spatial_compression, temporal_compression, is_causal = 8, 1, False

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
    ): ...
