"""A linear, causal video autoencoder: principal components of blocks of pixels, fitted in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora.models.autoencoder.items import MapItems, compute_all, in_micro_batches
from opensora.models.weight_files import save_shard
from opensora.registry import AUTOENCODERS

SPATIAL = 8
TEMPORAL = 4
BLOCK = "b c (t f) (h y) (w x) -> b t h w (c f y x)"  # a row of pixels for each block of f frames, y rows, x columns
SPREAD = 0.5  # a latent's standard deviation is its component's to this power


class BlockCodec(nn.Module):
    """Blocks of `frames` x 8 x 8 pixels <-> latents: coordinates along orthonormal components, divided by `scale`."""

    def __init__(self, in_channels: int, frames: int, latent_channels: int):
        super().__init__()
        self.frames = frames
        pixels = in_channels * frames * SPATIAL**2
        self.register_buffer("origin", torch.zeros(pixels))
        self.register_buffer("components", torch.zeros(latent_channels, pixels))
        self.register_buffer("scale", torch.ones(latent_channels))

    def encode(self, video: Tensor) -> Tensor:
        blocks = rearrange(video, BLOCK, f=self.frames, y=SPATIAL, x=SPATIAL)  # [B, t, h, w, pixels]
        latents = (blocks - self.origin) @ self.components.T / self.scale  # [B, t, h, w, C]
        return latents.movedim(-1, 1)  # [B, C, t, h, w]

    def decode(self, latents: Tensor) -> Tensor:
        blocks = (latents.movedim(1, -1) * self.scale) @ self.components + self.origin  # [B, t, h, w, pixels]
        back = " -> ".join(reversed(BLOCK.split(" -> ")))
        return rearrange(blocks, back, f=self.frames, y=SPATIAL, x=SPATIAL)  # [B, c, T, H, W]

    def rows(self, videos: Sequence[Tensor]) -> Tensor:
        """The blocks of all videos, [N, pixels] in fp64."""
        blocks = [rearrange(video, BLOCK, f=self.frames, y=SPATIAL, x=SPATIAL) for video in videos]
        return torch.cat([block.flatten(0, 3) for block in blocks]).double()

    def fit_components(self, blocks: Tensor) -> Tensor:
        """Principal components [C, pixels] about the median block, the background, whose latents so are 0."""
        self.origin.copy_(blocks.median(0).values)
        centred = blocks - self.origin
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))  # the weakest first
        components = vectors.T.flip(0)[: len(self.scale)]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return components * largest.sign()  # an eigenvector's own sign is arbitrary


@AUTOENCODERS.register("linear_causal")
class LinearCausal(nn.Module):
    """4 x 8 x 8 compression; a video's first frame is coded alone, then four at a time, each from its own pixels only.

    Deterministic, and so cheap that it makes small experiments possible on a CPU: the shapes demo trains with it.
    `fit` it to clips and `save`.

    The latents are made to be learnt from, which plain principal components are not:
    - A channel means the same in the first latent frame as in the others: the others' components are rotated onto
      what the first's would see in a picture that stands still, and both share a scale. One linear layer of the model
      reads and writes all of them.
    - Their mean square is 1 over the channels, that of the noise, but the spread between strong and weak components
      is kept to its root: as it is, it leaves the outline under the noise; evened out, it would make the residue of
      the video codec count as much as colour and place.

    Args:
        from_pretrained: file written by `save` (safetensors), loaded strictly; None leaves it to be fitted.
        in_channels: of the pixels. latent_channels: of the latents.

    Attributes:
        map_items: computes what becomes of a batch's samples; may be replaced.
    """

    temporal_compression = TEMPORAL
    spatial_compression = SPATIAL
    is_causal = True

    def __init__(
        self,
        from_pretrained: str | None = None,
        in_channels: int = 3,
        latent_channels: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.map_items: MapItems = compute_all
        self.first = BlockCodec(in_channels, 1, latent_channels)
        self.rest = BlockCodec(in_channels, TEMPORAL, latent_channels)
        if from_pretrained is not None:
            self._load(from_pretrained)
        self.to(device=device, dtype=dtype)

    def encode(self, video: Tensor, noise: Callable[[torch.Size], Tensor] | None = None) -> Tensor:
        """Pixels [B, c, T, H, W] in [-1, 1] -> latents [B, C, (T-1)/4+1, H/8, W/8] of about unit variance.

        `noise` is not used: there is no posterior to draw from.

        Raises:
            ValueError: T is not 4n + 1, or H or W no multiple of 8.
        """
        self.latent_size(tuple(video.shape[2:]))
        return self._by_sample(self._encode, video)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] -> pixels [B, c, 4(t-1)+1, 8h, 8w], about [-1, 1], not clamped."""
        return self._by_sample(self._decode, latents)

    def _by_sample(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        work = partial(in_micro_batches, function, lambda shape: len(batch))
        return torch.cat(self.map_items(work, batch.split(1)))

    def _encode(self, video: Tensor) -> Tensor:
        latents = self.first.encode(video[:, :, :1])
        if video.shape[2] == 1:
            return latents
        return torch.cat([latents, self.rest.encode(video[:, :, 1:])], dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        frames = self.first.decode(latents[:, :, :1])
        if latents.shape[2] == 1:
            return frames
        return torch.cat([frames, self.rest.decode(latents[:, :, 1:])], dim=2)

    def drop_decoder(self) -> None:
        """Nothing to free: `decode` needs no more than `encode` does."""

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of a video -> those of its latents."""
        frames, height, width = size
        if (frames - 1) % TEMPORAL or height % SPATIAL or width % SPATIAL:
            raise ValueError(
                f"a video of {frames} x {height} x {width} (frames, height, width) does not fit the autoencoder: give "
                f"{TEMPORAL}n + 1 frames and multiples of {SPATIAL} pixels"
            )
        return (frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL

    @torch.no_grad()
    def fit(self, videos: Sequence[Tensor]) -> None:
        """Fit to clips [B, c, T, H, W] in [-1, 1]; T may differ among them, and some must have more than one frame."""
        first = self.first.rows([video[:, :, :1] for video in videos])  # [N, c*64]
        rest = self.rest.rows([video[:, :, 1:] for video in videos if video.shape[2] > 1])  # [M, c*4*64]
        first_components, rest_components = self.first.fit_components(first), self.rest.fit_components(rest)

        seen = (rest - self.rest.origin) @ rest_components.T  # [M, C]
        still = rearrange(rest, "n (c f p) -> n f c p", f=TEMPORAL, p=SPATIAL**2).mean(1).flatten(1)  # [M, c*64]
        wanted = (still - self.first.origin) @ first_components.T  # [M, C]
        left, _, right = torch.linalg.svd(wanted.T @ seen)
        rotation = left @ right  # orthogonal, of `seen` onto `wanted` (Schoenemann 1966): [C, C]
        self.first.components.copy_(first_components)
        self.rest.components.copy_(rotation @ rest_components)

        # Four equal frames have twice the norm of one.
        alone = 2 * ((first - self.first.origin) @ first_components.T)
        deviation = ((alone.square().mean(0) + (seen @ rotation.T).square().mean(0)) / 2).clamp_min(1e-12).sqrt()
        spread = deviation**SPREAD
        scale = deviation / spread * spread.square().mean().sqrt()
        self.first.scale.copy_(scale / 2)
        self.rest.scale.copy_(scale)

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_shard(Path(path), self.state_dict())

    def _load(self, path: str) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"ae.from_pretrained='{path}' does not exist: make it with scripts/demo/make_shapes.py"
            )
        try:
            self.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            first_line, *more = str(error).splitlines()
            reason = (more or [first_line])[0].strip()
            raise ValueError(
                f"ae.from_pretrained='{path}' is no linear autoencoder of {self.in_channels} channels of pixels and "
                f"{self.latent_channels} of latents ({reason}): make it anew, or set ae.latent_channels"
            ) from error
