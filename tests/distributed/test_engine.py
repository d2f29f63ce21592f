"""ZeRO through the engine against plain single-process AdamW."""

import pytest
import torch
from torch import nn

from opensora.parallel.engine import Engine

STEPS, GLOBAL_BATCH, LR, CLIP = 4, 4, 1e-2, 0.25


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.SiLU(), nn.Linear(13, 3)).to(dtype)  # sizes that 2 does not divide


def data(step: int):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 6, 7, generator=generator), torch.randn(GLOBAL_BATCH, 6, 3, generator=generator)


def loss_of(model, x, y):
    return (model(x.to(model_dtype(model))).float() - y).square().mean()


def model_dtype(model) -> torch.dtype:
    return next(model.parameters()).dtype


def train_with_engine(context, plugin: str, dtype: torch.dtype):
    """(weights, gradient norms) after STEPS updates; micro-batches are split over ranks, then accumulated."""
    model = small_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    engine = Engine(context, model, lambda _: optimizer, plugin, {"reduce_bucket_size_in_m": 1}, dtype, CLIP)
    norms, accumulation = [], GLOBAL_BATCH // context.world_size
    for step in range(STEPS):
        x, y = data(step)
        for micro_step in range(accumulation):
            i = micro_step * context.world_size + context.rank
            engine.forward_backward(lambda m, i=i, x=x, y=y: loss_of(m, x[i], y[i]), micro_step, accumulation)
        norms.append(engine.step(LR))
    return [p.detach().float() for p in model.parameters()], norms


def train_plainly():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    norms = []
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        sum(loss_of(model, x[i], y[i]) / GLOBAL_BATCH for i in range(GLOBAL_BATCH)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("plugin", ["zero1", "zero2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_zero_equals_plain_adamw(one_rank, two_ranks, plugin, dtype, tolerance):
    weights, norms = train_plainly()
    for ranks in (one_rank, two_ranks):
        for found_weights, found_norms in ranks(train_with_engine, plugin, dtype):
            torch.testing.assert_close(found_weights, weights, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(found_norms, norms, atol=tolerance, rtol=tolerance)


def build_with_unknown_setting(context):
    try:
        optimizer = torch.optim.AdamW(small_model().parameters())
        Engine(context, small_model(), lambda _: optimizer, "zero2", {"reduce_bucket_sise_in_m": 1}, torch.float32, 1.0)
    except ValueError as error:
        return str(error)


def test_unknown_plugin_setting_names_the_nearest(one_rank):
    (message,) = one_rank(build_with_unknown_setting)
    assert "plugin_config.reduce_bucket_sise_in_m" in message
    assert "reduce_bucket_size_in_m" in message
