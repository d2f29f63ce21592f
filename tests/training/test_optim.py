import math

import pytest
import torch

from opensora.training.optim import LearningRate, build_optimizer, optimizer_class


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
        ("lr_scheduler", "optim.cls='lr_scheduler' is unknown"),
    ],
)
def test_unknown_optimizers_are_named(name, message):
    with pytest.raises(ValueError) as error:
        optimizer_class(name)
    assert message in str(error.value)
