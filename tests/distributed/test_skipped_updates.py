"""Updates that are not made: nothing changes, all ranks agree, the run goes on or says why not."""

import math

import pytest
import torch
from runs import assert_same_end, metrics, numbers, train
from torch import nn

from opensora.parallel.engine import Engine
from opensora.training.callbacks import UpdateGuard


def update_around_a_skipped_one(context, plugin: str, dtype: torch.dtype):
    """Weights, masters and moments after two updates, with one in between that is not accepted or (None) not there."""
    results = []
    for gradient in (None, 1e3, float("nan")):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        engine = Engine(context, model, lambda _, built=optimizer: built, plugin, {}, dtype, 1.0)
        for scale in (1.0, gradient, 2.0):
            if scale is None:
                continue
            engine.forward_backward(lambda m, s=scale: (s * m(torch.ones(1, 5, dtype=dtype))).float().sum())
            norm = engine.step(0.1, accept=lambda norm: norm < 100)
            assert (norm < 100) == (scale in (1.0, 2.0))
        shards = engine.shards()
        moments = [engine.optimizer_state(shard)["exp_avg"] for shard in shards]
        results.append([*model.parameters(), *(shard.master for shard in shards), *moments])
    return [all(map(torch.equal, results[0], result)) for result in results[1:]]


@pytest.mark.parametrize(("plugin", "dtype"), [("zero1", torch.float32), ("zero2", torch.bfloat16)])
def test_a_skipped_update_leaves_everything_as_it_is(two_ranks, plugin, dtype):
    assert two_ranks(update_around_a_skipped_one, plugin, dtype) == [[True, True], [True, True]]


def error_of(context, root, arguments):
    try:
        train(context, root, arguments)
    except ValueError as error:
        return str(error)


def test_a_run_that_diverges_stops_and_names_the_batches(two_ranks, shapes, tmp_path):
    """A learning rate that ends every model: the first update is finite, all after it are not."""
    arguments = ["--outputs", str(tmp_path), "--exp-name", "run", "--lr", "1e30", "--warmup-steps", "0"]
    arguments += ["--dtype", "fp32", "--num-workers", "0", "--max-steps", "9", "--max-skipped-in-row", "3"]
    messages = two_ranks(error_of, shapes.root, shapes.train_arguments(*arguments, "--ckpt-every", "1"))
    assert messages[0] == messages[1]
    for part in ("3 updates in a row were skipped", "not finite", "rank 0: loss inf", "rank 1: loss inf", "64px/"):
        assert part in messages[0]
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3]
    assert not any(math.isfinite(line["loss"]) for line in lines[1:])


def test_spikes_are_skipped_and_a_resume_is_exact(two_ranks, shapes, tmp_path):
    """What is a spike depends on the updates before, which the checkpoint holds."""
    common = ["--outputs", str(tmp_path), "--dtype", "fp32", "--num-workers", "0", "--ckpt-every", "22"]
    common += ["--skip-spikes", "1.05", "--max-skipped-in-row", "30", "--ema-decay", "0.9"]
    common += ["--bucket-config", "{'64px': {1: (1.0, 1)}}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "whole", "--max-steps", "30"))
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "parts", "--max-steps", "22"))
    resume = ["--exp-name", "parts", "--max-steps", "30", "--load", str(parts)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *resume))
    skipped = [line["skipped"] for line in metrics(whole)]
    assert skipped[19] == 0 and 0 < skipped[-1] < 10
    assert [line["skipped"] for line in metrics(parts)] == skipped
    assert numbers(parts) == numbers(whole)
    assert_same_end(parts, whole)


def test_what_is_a_spike():
    guard = UpdateGuard(max_in_row=5, spikes=3.0)
    assert guard.accepts(1.0, 100.0)  # of nothing to compare with
    assert all(guard.accepts(1.0, 1.0) for _ in range(19))
    assert not guard.accepts(1.0, 3.1) and guard.accepts(1.0, 2.9)
    again = UpdateGuard(max_in_row=5, spikes=3.0)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict() and again.skipped == 1
    assert not again.accepts(float("inf"), 1.0) and not again.accepts(1.0, float("nan"))
    assert UpdateGuard(max_in_row=5, spikes=None).accepts(1.0, 1e9)
