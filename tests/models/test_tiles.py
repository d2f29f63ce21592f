"""Tiles and their blend against diffusers' own loops, bit for bit, and against what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.models.autoencoder.items import in_micro_batches
from opensora.models.autoencoder.tiles import TileSize, cut, join, map_tiles

SIDE, FRAMES = 96, 32  # a quarter of 12 latents is three: a third is not exact


class Encoder(nn.Module):
    """Compresses 4 x 8 x 8 as the network does, exactly the same wherever the tile lies in memory; its outcome where
    tiles overlap depends on the tile. The networks themselves: test_hunyuan_vae.py."""

    def forward(self, x):
        return x[:, :1, ::4, ::8, ::8] + torch.arange(8).to(x.dtype).view(-1, 1, 1, 1) * x[0, 0, 0, 0, 0]


class Decoder(nn.Module):
    def forward(self, z):
        frames = [z[:, :3, :1], z[:, :3, 1:].repeat_interleave(4, dim=2)]
        x = torch.cat(frames, dim=2).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        ramp = torch.arange(x.shape[-1] * x.shape[-2]).view(x.shape[-2:]) / 100
        return x + ramp.to(x.dtype) * z[0, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def vae():
    """diffusers' loops around a network that they don't know."""
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv = Encoder(), Decoder(), nn.Identity(), nn.Identity()
    for side in ("height", "width"):
        setattr(vae, f"tile_sample_min_{side}", SIDE)
        setattr(vae, f"tile_sample_stride_{side}", SIDE * 3 // 4)
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = FRAMES, FRAMES * 3 // 4
    return vae


SIZES = [
    (1, 96, 96),  # as large as a tile
    (1, 64, 120),  # one row of tiles, which is no whole tile
    (1, 208, 96),
    (5, 312, 168),
    (32, 96, 104),
    (33, 48, 48),
    (73, 48, 96),  # the last tile is a single frame
    (75, 120, 144),  # the last tile's frames make no latent of their own
    (65, 168, 240),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spatial, temporal", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", SIZES)
def test_they_are_those_of_diffusers(vae, size, spatial, temporal, dtype):
    vae.use_tiling, vae.use_framewise_encoding, vae.use_framewise_decoding = spatial, temporal, temporal
    tile = TileSize(SIDE if spatial else None, FRAMES if temporal else None)
    latent_tile = TileSize(SIDE // 8 if spatial else None, FRAMES // 4 if temporal else None)
    one_by_one = lambda network: lambda tiles: [network(tile) for tile in tiles]  # noqa: E731

    video = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.cat([vae.encode(clip).latent_dist.parameters for clip in video.split(1)])
    found = map_tiles(one_by_one(vae.encoder), video, tile, latent_tile)
    assert torch.equal(found, expected)

    z = expected[:, :4].contiguous()
    expected = torch.cat([vae.decode(clip).sample for clip in z.split(1)])
    found = map_tiles(one_by_one(vae.decoder), z, latent_tile, tile)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_that_agree_where_they_overlap_give_the_clip_back(size):
    clip = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    tile = TileSize(SIDE, FRAMES)
    joined = join([[[part.clone() for part in row] for row in rows] for rows in cut(clip, tile)], tile)
    torch.testing.assert_close(joined, clip)


def test_the_later_tile_fades_in_linearly():
    first, second = torch.zeros(1, 1, 1, 8, 16), torch.ones(1, 1, 1, 8, 8)
    row = join([[[first, second]]], TileSize(16, None))[0, 0, 0, 0]
    assert row.tolist() == [0.0] * 12 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 4


def test_items_of_one_shape_go_together_and_come_back_in_order():
    items = [torch.full((1, length), float(i)) for i, length in enumerate([2, 3, 2, 2, 3, 1])]
    seen = []

    def network(batch):
        seen.append(tuple(batch.shape))
        return batch * 10

    results = in_micro_batches(network, lambda shape: 2, items)
    assert seen == [(2, 2), (1, 2), (2, 3), (1, 1)]
    assert all(torch.equal(result, item * 10) for result, item in zip(results, items, strict=True))
