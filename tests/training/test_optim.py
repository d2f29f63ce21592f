import math
import sys

import pytest
import torch

from opensora.training.optim import (
    BITSANDBYTES_NAMES,
    LearningRate,
    OptimizerRegistry,
    build_optimizer,
    optimizer_class,
)


def test_warm_up_is_the_documented_line_then_constant():
    rate = LearningRate(5e-5, warmup=4)
    for update in range(4):
        assert rate(update) == pytest.approx(1e-6 + (update + 1) / 5 * (5e-5 - 1e-6))
    assert rate(4) == rate(1000) == 5e-5


@pytest.mark.parametrize("warmup", [None, 0])
def test_no_warm_up_starts_at_the_rate(warmup):
    assert LearningRate(1e-4, warmup)(0) == 1e-4


def test_cosine_falls_from_the_rate_to_zero():
    rate = LearningRate(1.0, warmup=10, cosine=True, total=110)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.5)
    assert rate(35) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(0.0)
    assert rate(500) == pytest.approx(0.0)


def test_hybrid_adam_updates_as_adamw_does():
    settings = {"cls": "HybridAdam", "lr": 1e-2, "eps": 1e-15, "weight_decay": 0.1, "adamw_mode": True}
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 10))
    twin = torch.nn.Parameter(weight.detach().clone())
    optimizers = build_optimizer([weight], settings), torch.optim.AdamW([twin], lr=1e-2, eps=1e-15, weight_decay=0.1)
    for step in range(3):
        for parameter, optimizer in zip((weight, twin), optimizers, strict=True):
            parameter.grad = torch.sin(torch.arange(10.0) + step)
            optimizer.step()
    torch.testing.assert_close(weight, twin, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HybridAdm", "optim.cls='HybridAdm' is unknown (did you mean 'HybridAdam'?)"),
        ("AdamW8bt", "optim.cls='AdamW8bt' is unknown (did you mean 'AdamW8bit'?)"),
        ("lr_scheduler", "optim.cls='lr_scheduler' is unknown"),
        ("LBFGS", "optim.cls='LBFGS' computes the loss several times in one update"),
        ("Muon", "optim.cls='Muon' orthogonalises whole matrices, and ZeRO gives it flat parts of parameters: set"),
        ("Adafactor", "optim.cls='Adafactor' scales an update by the norm of its whole parameter"),
        ("SparseAdam", "optim.cls='SparseAdam' takes sparse gradients only"),
        ("LAMB", "optim.cls='LAMB' scales an update by norms of its whole parameter"),
    ],
)
def test_optimizers_that_cannot_be_are_one_line(name, message):
    with pytest.raises(ValueError) as error:
        optimizer_class(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_8_bit_optimizers_are_those_of_bitsandbytes_and_take_numbers():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert optimizer_class("PagedAdamW8bit") is bitsandbytes.optim.PagedAdamW8bit
    registry = OptimizerRegistry()
    for name in BITSANDBYTES_NAMES:
        assert isinstance(registry.parameters(name)["weight_decay"].default, float)
    assert set(BITSANDBYTES_NAMES) <= set(registry.names())


def test_without_bitsandbytes_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"optim.cls='Lion8bit' needs the package bitsandbytes: pip install"):
        optimizer_class("Lion8bit")
    assert "Lion8bit" in OptimizerRegistry().names()


def test_vectors_are_a_group_of_their_own_when_asked():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    settings = {"cls": "AdamW", "lr": 1e-3, "weight_decay": 0.1, "no_decay_norms_and_biases": True}
    decayed, others = build_optimizer(model.parameters(), settings).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in others["params"]] == [id(p) for p in (model[0].bias, model[1].weight, model[1].bias)]
    for one_group in ({"no_decay_norms_and_biases": False}, {"weight_decay": 0.0}):
        assert len(build_optimizer(model.parameters(), {**settings, **one_group}).param_groups) == 1
    only_matrices = [p for p in model.parameters() if p.ndim > 1]
    assert len(build_optimizer(only_matrices, settings).param_groups) == 1
