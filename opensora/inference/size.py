"""How large a sample is: from a config's `sampling_option` to pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from opensora.data.aspect import closest_ratio, image_size, resolution_sizes
from opensora.registry import AUTOENCODERS


class Compression(NamedTuple):
    """Pixels and frames that an autoencoder makes one latent of; a causal one keeps the first frame apart."""

    spatial: int
    temporal: int
    causal: bool

    @classmethod
    def of(cls, autoencoder: Any) -> Compression:
        """Of an autoencoder, or of its class: what there is before its weights are read."""
        return cls(autoencoder.spatial_compression, autoencoder.temporal_compression, autoencoder.is_causal)


@dataclass(frozen=True)
class SampleSize:
    """Frames and pixels of a sample; `name` is what its folder is called after."""

    num_frames: int
    height: int
    width: int
    name: str

    @classmethod
    def from_config(cls, option: Mapping[str, Any], compression: Compression, patch_size: int) -> SampleSize:
        """`width` and `height` of a `sampling_option`, else the table's size of `resolution` and `aspect_ratio`;
        rounded up to whole tokens.

        Raises:
            ValueError: an unknown resolution or ratio, half a size, or frames that do not fit the autoencoder.
        """
        multiple = compression.spatial * patch_size  # pixels of a token's side
        check_num_frames(option["num_frames"], compression.temporal, compression.causal)
        height, width = option.get("height"), option.get("width")
        if (height is None) != (width is None):
            raise ValueError(f"sampling_option.height={height} and width={width}: give both, or neither")
        if height is not None:
            if min(height, width) < 1:
                raise ValueError(f"sampling_option.height={height} and width={width} must be positive")
            name = f"{width}x{height}"
        elif option.get("resolution") and option.get("aspect_ratio"):
            name = option["resolution"]
            height, width = image_size(name, option["aspect_ratio"], multiple, training=False)
        else:
            raise ValueError(
                "sampling_option has no size: give resolution and aspect_ratio (256px, 16:9), or height and width"
            )
        return cls(option["num_frames"], _round_up(height, multiple), _round_up(width, multiple), name)

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1


def sample_size(cfg: Mapping[str, Any]) -> SampleSize:
    """The size that a whole config asks for; ValueError as `SampleSize.from_config`."""
    compression = Compression.of(AUTOENCODERS.get(cfg["ae"]["type"]))
    return SampleSize.from_config(cfg["sampling_option"], compression, cfg["model"].get("patch_size", 2))


def first_frame_size(cfg: Mapping[str, Any], size: SampleSize) -> SampleSize:
    """The first frame that use_t2i2v draws: `img_resolution` at the video's aspect ratio, or at the table's nearest to
    a size given as height and width."""
    compression = Compression.of(AUTOENCODERS.get(cfg["img_flux_ae"]["type"]))
    multiple = compression.spatial * cfg["img_flux"].get("patch_size", 2)
    name, option = cfg["img_resolution"], cfg["sampling_option"]
    ratio = option.get("aspect_ratio")
    if option.get("height") is not None:
        ratio = closest_ratio(size.height, size.width, list(resolution_sizes(name, multiple, training=False)))
    return SampleSize(1, *image_size(name, ratio, multiple, training=False), name)


def check_num_frames(num_frames: int, compression: int, causal: bool) -> None:
    """ValueError unless an autoencoder with this temporal compression takes `num_frames` frames.

    A causal one takes a first frame and whole blocks of `compression` frames (4k + 1), another only blocks.
    """
    rest = (num_frames - 1 if causal else num_frames) % compression
    if num_frames == 1 or (num_frames > 1 and rest == 0):
        return
    below = num_frames - rest
    near = sorted({max(below, 1), max(below + compression, 1)})
    raise ValueError(
        f"sampling_option.num_frames={num_frames} does not fit the autoencoder, which takes "
        f"{compression}k{'+1' if causal else ''} frames (or one): use {' or '.join(map(str, near))}"
    )


def _round_up(pixels: int, multiple: int) -> int:
    return -(-pixels // multiple) * multiple
