"""Every optimizer that `optim.cls` offers, on ZeRO's shards: against the same one without ZeRO, and resumed."""

import inspect
from pathlib import Path

import pytest
import torch
from runs import assert_same_end, numbers, train
from torch import nn

from opensora.parallel.engine import Engine
from opensora.training.checkpoint import Checkpointer
from opensora.training.optim import BITSANDBYTES_NAMES, TORCH_NAMES, build_optimizer, optimizer_class
from opensora.training.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

STEPS, GLOBAL_BATCH = 4, 4
EIGHT_BIT = tuple(name for name in BITSANDBYTES_NAMES if "8bit" in name)
RESUMED = ("HybridAdam", "SGD", "ASGD", "NAdam", "Lion", *EIGHT_BIT)


def settings_of(name: str, **more) -> dict:
    takes = inspect.signature(optimizer_class(name)).parameters
    wanted = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    return {"cls": name, **{key: value for key, value in wanted.items() if key in takes}, **more}


def small_model(width: int, dtype=torch.float32) -> nn.Module:
    """Of width 130, two matrices have more than 2 * 4096 elements: their moments are in 8 bits, the others' are not."""
    torch.manual_seed(0)
    layers = nn.Linear(7, width), nn.LayerNorm(width), nn.Linear(width, 150), nn.SiLU(), nn.Linear(150, 130)
    return nn.Sequential(*layers).to(dtype)


def data(step: int):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 6, 7, generator=generator), torch.randn(GLOBAL_BATCH, 6, 130, generator=generator)


def loss_of(model, x, y):
    return (model(x.to(next(model.parameters()).dtype)).float() - y).square().mean()


def make_engine(context, settings: dict, width: int, dtype=torch.float32, weights=None) -> Engine:
    model = small_model(width, dtype)
    if weights is not None:
        model.load_state_dict(weights)
    return Engine(
        context, model, lambda trained: build_optimizer(trained.parameters(), settings), "zero2", {}, dtype, 0.0
    )


def update(context, engine: Engine, steps: range, lr: float = 1e-2) -> list[torch.Tensor]:
    accumulation = GLOBAL_BATCH // context.world_size
    for step in steps:
        x, y = data(step)
        for micro_step in range(accumulation):
            i = micro_step * context.world_size + context.rank
            engine.forward_backward(lambda m, i=i, x=x, y=y: loss_of(m, x[i], y[i]), micro_step, accumulation)
        engine.step(lr)
    return [p.detach().clone() for p in engine.module.parameters()]


def with_zero(context, settings: dict, width: int, dtype=torch.float32):
    return update(context, make_engine(context, settings, width, dtype), range(STEPS))


def without_zero(make_optimizer, width: int):
    model = small_model(width)
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        sum(loss_of(model, x[i], y[i]) / GLOBAL_BATCH for i in range(GLOBAL_BATCH)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_optimizers_do_not_see_that_they_are_sharded(two_ranks, name):
    settings = settings_of(name)
    arguments = {key: value for key, value in settings.items() if key != "cls"}
    expected = without_zero(lambda model: getattr(torch.optim, name)(model.parameters(), **arguments), 11)
    for found in two_ranks(with_zero, settings, 11):
        torch.testing.assert_close([p.float() for p in found], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
def test_bitsandbytes_on_one_rank_is_bitsandbytes(one_rank, name):
    """Not exact: ZeRO and autograd add up gradients in another order, and 8 bits round what is left of that."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = settings_of(name, lr=1e-3)
    cls = getattr(bitsandbytes.optim, name)
    expected = without_zero(lambda model: cls(model.parameters(), lr=1e-2, weight_decay=0.1), 130)
    (found,) = one_rank(with_zero, settings, 130)
    start = [p.detach() for p in small_model(130).parameters()]
    moved = max((a - b).abs().max().item() for a, b in zip(expected, start, strict=True))
    assert moved > 1e-2
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    assert difference.square().mean().sqrt() < 0.02 * moved


# ---------------------------------------------------------------------------------------- groups without decay


def with_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if name.endswith("weight") and name != "1.weight"]
    vectors = [p for name, p in model.named_parameters() if name.endswith("bias") or name == "1.weight"]
    return torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.5}], lr=1e-2
    )


@pytest.mark.parametrize(("dtype", "typical", "largest"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 5e-2)])
def test_norms_and_biases_are_not_decayed_when_asked(one_rank, two_ranks, dtype, typical, largest):
    """In bf16 the sign of a tiny gradient may differ, and with it Adam's first step."""
    settings = {"cls": "HybridAdam", "lr": 1e-3, "weight_decay": 0.5, "no_decay_norms_and_biases": True}
    expected = without_zero(with_groups, 11)
    for ranks in (one_rank, two_ranks):
        for found in ranks(with_zero, settings, 11, dtype):
            difference = torch.cat([(a - b).abs().flatten() for a, b in zip(found, expected, strict=True)])
            assert difference.mean() < typical and difference.max() < largest
    (decayed,) = one_rank(with_zero, {**settings, "no_decay_norms_and_biases": False}, 11)
    assert max((a - b).abs().max() for a, b in zip(decayed, expected, strict=True)) > 1e-2


# ------------------------------------------------------------------------------------------------------ resuming


def stop(context, folder: str, settings: dict, dtype):
    """The weights after all steps, and half of them in a checkpoint: (weights, state dict of the half)."""
    whole = update(context, make_engine(context, settings, 130, dtype), range(STEPS))
    engine = make_engine(context, settings, 130, dtype)
    update(context, engine, range(STEPS // 2))
    Checkpointer(context, engine, None).save(Path(folder), TrainState(global_step=2), {}, {})
    return whole, {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


def go_on(context, checkpoint: str, settings: dict, dtype, weights):
    engine = make_engine(context, settings, 130, dtype, weights)
    try:
        Checkpointer(context, engine, None).load(Path(checkpoint))
    except ValueError as error:
        return str(error)
    return update(context, engine, range(STEPS // 2, STEPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(two_ranks, tmp_path, name, dtype):
    settings = settings_of(name, no_decay_norms_and_biases=True)
    stopped = two_ranks(stop, str(tmp_path), settings, dtype)
    checkpoint = tmp_path / "epoch0-global_step2"
    assert (checkpoint / "optimizer_local/rank1.pt").exists() == (name in EIGHT_BIT)
    for (whole, _), resumed in zip(
        stopped, two_ranks(go_on, str(checkpoint), settings, dtype, stopped[0][1]), strict=True
    ):
        assert not isinstance(resumed, str), resumed
        assert all(map(torch.equal, whole, resumed))


def test_another_number_of_ranks_resumes_groups_and_refuses_8_bits(one_rank, two_ranks, tmp_path):
    apart = {"cls": "AdamW", "lr": 1e-2, "weight_decay": 0.5, "no_decay_norms_and_biases": True}
    whole, weights = two_ranks(stop, str(tmp_path / "32"), apart, torch.float32)[0]
    checkpoint = str(tmp_path / "32/epoch0-global_step2")
    (resumed,) = one_rank(go_on, checkpoint, apart, torch.float32, weights)
    torch.testing.assert_close(resumed, whole, atol=1e-5, rtol=1e-5)

    eight = settings_of("AdamW8bit")
    _, weights = two_ranks(stop, str(tmp_path / "8"), eight, torch.float32)[0]
    checkpoint = str(tmp_path / "8/epoch0-global_step2")
    (message,) = one_rank(go_on, checkpoint, eight, torch.float32, weights)
    assert "its 8-bit optimizer state was written by 2 processes and can't be divided among 1: start 2, or" in message
    (message, _) = two_ranks(go_on, checkpoint, settings_of("Lion8bit"), torch.float32, weights)
    assert "its optimizer is AdamW8bit, not Lion8bit: set --optim.cls AdamW8bit" in message
    (message, _) = two_ranks(go_on, checkpoint, {**eight, "min_8bit_size": 2**20}, torch.float32, weights)
    assert "uint8, with optim as it is now" in message and "config.txt" in message


def test_a_whole_run_with_8_bit_moments_and_groups_resumes_exactly(two_ranks, shapes, tmp_path):
    optim = "dict(cls='AdamW8bit', lr=1e-3, weight_decay=0.1, no_decay_norms_and_biases=True, min_8bit_size=512)"
    common = ["--optim", optim, "--ema-decay", "0.9", "--dtype", "bf16", "--num-workers", "0", "--ckpt-every", "2"]
    common += ["--outputs", str(tmp_path)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "whole", "--max-steps", "4"))
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "parts", "--max-steps", "2"))
    resume = ["--exp-name", "parts", "--max-steps", "4", "--load", str(parts)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *resume))
    assert list(parts.glob("*/optimizer_local/rank1.pt"))
    assert numbers(parts) == numbers(whole)
    assert_same_end(parts, whole)
