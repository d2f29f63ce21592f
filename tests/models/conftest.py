"""Small transformers with random weights, and inputs for them."""

import pytest
import torch

from opensora.models.mmdit import MMDiT

SMALL = {
    "in_channels": 16,
    "vec_in_dim": 10,
    "context_in_dim": 12,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [4, 6, 6],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
}


@pytest.fixture
def small_settings():
    """settings(**changes) -> a config's `model` for a small transformer."""
    return lambda **changes: {"type": "flux", **SMALL, **changes}


@pytest.fixture
def small_mmdit():
    """build(**changes) -> a small MMDiT all of whose weights are random, not its initial zeros."""

    def build(**changes):
        model = MMDiT(**{**SMALL, **changes})
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.2 * noise if name.endswith("scale") else 0.2 * noise
        return model

    return build


@pytest.fixture
def small_inputs():
    """inputs(model, **changes) -> the arguments of its forward."""

    def make(model, batch=2, frames=2, rows=2, columns=3, text=5, **changes):
        generator = torch.Generator().manual_seed(1)
        normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        grid = torch.cartesian_prod(*(torch.arange(n).float() for n in (frames, rows, columns)))  # [L, 3]
        length = len(grid)
        return {
            "img": normal(batch, length, model.in_channels),
            "img_ids": grid.expand(batch, -1, -1),
            "txt": normal(batch, text, model.txt_in.in_features),
            "txt_ids": torch.zeros(batch, text, 3),
            "timesteps": torch.rand(batch, generator=generator),
            "y_vec": normal(batch, model.vector_in.in_layer.in_features),
            "cond": normal(batch, length, model.in_channels + model.patch_size**2) if model.cond_embed else None,
            "guidance": torch.full((batch,), 4.0) if model.guidance_embed else None,
            **changes,
        }

    return make
