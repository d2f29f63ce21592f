"""Small stand-ins for the models of a pipeline: everything that sampling asks of them, in formulas."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensora.common import get_logger
from opensora.inference.pipeline import Pipeline
from opensora.inference.sampler import SamplerOptions
from opensora.inference.size import SampleSize
from opensora.models.mmdit import MMDiT


class MeanAutoencoder(nn.Module):
    """Latents are means over blocks of 4 x 8 x 8 pixels (the first frame apart); the fourth channel is 0."""

    latent_channels, temporal_compression, spatial_compression, is_causal = 4, 4, 8, True

    def encode(self, video, noise=None):
        space = F.avg_pool3d(video, (1, 8, 8))  # [B, 3, T, h, w]
        rest = F.avg_pool3d(space[:, :, 1:], (4, 1, 1)) if space.shape[2] > 1 else space[:, :, 1:]
        return F.pad(torch.cat([space[:, :, :1], rest], dim=2), (0, 0, 0, 0, 0, 0, 0, 1))

    def decode(self, latents):
        pixels = latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)], dim=2)

    def latent_size(self, size):
        frames, height, width = size
        return (frames - 1) // 4 + 1, height // 8, width // 8


class NoisyAutoencoder(MeanAutoencoder):
    """Its latents are drawn: means plus noise."""

    def encode(self, video, noise=None):
        latents = super().encode(video)
        return latents + 0.1 * noise(latents.shape)


class HashText(nn.Module):
    """Every text has its own fixed embedding."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.encoded = shape, []

    def forward(self, texts):
        self.encoded += texts
        seeds = [sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31 for text in texts]
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@pytest.fixture
def tiny_mmdit():
    """build(**settings) -> a transformer for 4 latent channels whose weights are random, not its initial zeros."""

    def build(**settings):
        generator = torch.Generator().manual_seed(0)
        model = MMDiT(
            **{
                "in_channels": 16,
                "vec_in_dim": 8,
                "context_in_dim": 12,
                "hidden_size": 32,
                "mlp_ratio": 2.0,
                "num_heads": 2,
                "depth": 1,
                "depth_single_blocks": 1,
                "axes_dim": [4, 6, 6],
                "theta": 10_000,
                "qkv_bias": True,
                "guidance_embed": False,
                "cond_embed": True,
                "fused_qkv": False,
                "use_liger_rope": True,
                **settings,
            }
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture
def toy_pipeline(tiny_mmdit):
    """build(...) -> a pipeline of stand-ins for samples of 9 frames of 32 x 48 pixels."""

    def build(autoencoder=None, model=None, num_frames=9, texts=None, meter=None, **options):
        t5, clip = texts or (HashText(5, 12), HashText(8))
        return Pipeline(
            model or tiny_mmdit(),
            autoencoder or MeanAutoencoder(),
            t5,
            clip,
            options=SamplerOptions(**{"num_steps": 3, "guidance": 3.0, "guidance_img": 2.0, **options}),
            size=SampleSize(num_frames, 32, 48, "toy"),
            device=torch.device("cpu"),
            dtype=torch.float32,
            meter=meter,
        )

    return build


class Said(logging.Handler):
    """Messages of the project's logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def said():
    handler = Said()
    get_logger().addHandler(handler)
    yield handler.messages
    get_logger().removeHandler(handler)


@pytest.fixture
def hash_text():
    return HashText


@pytest.fixture
def noisy_autoencoder():
    return NoisyAutoencoder()
