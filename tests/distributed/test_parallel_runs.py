"""Whole runs that share a model among ranks, and checkpoints that go from one layout to another."""

import pytest
import torch
from runs import metrics, numbers, train

from opensora.checkpoint_folder import list_checkpoints
from opensora.models.weight_files import open_averages, open_weights

HYBRID = "zero_stage=2,enable_sequence_parallelism=True"
SEQUENCE = f"dict(tp_size=1,sp_size=2,sequence_parallelism_mode='ring_attn',{HYBRID})"
HEADS = f"dict(tp_size=1,sp_size=2,sequence_parallelism_mode='all_to_all',{HYBRID})"
TENSOR = f"dict(tp_size=2,sp_size=1,{HYBRID})"
TENSOR_SEQUENCE = f"dict(tp_size=2,sp_size=2,sequence_parallelism_mode='ring_attn',{HYBRID})"

# Momentum is state to be carried over; Adam would turn rounding of tiny gradients into steps of full size.
COMMON = ["--optim", "dict(cls='SGD',lr=0.02,momentum=0.9)", "--ema-decay", "0.8", "--dtype", "fp32"]
COMMON += ["--num-workers", "0", "--ckpt-every", "2", "--keep-n-latest", "9"]


def run(ranks, shapes, outputs, name: str, steps: int, plugin_config: str | None = None, load=None) -> None:
    arguments = [*COMMON, "--outputs", str(outputs), "--exp-name", name, "--max-steps", str(steps)]
    if plugin_config:
        arguments += ["--plugin", "hybrid", "--plugin_config", plugin_config]
    if load:
        arguments += ["--load", str(load)]
    ranks(train, shapes.root, shapes.train_arguments(*arguments))


def assert_same_weights(run_folder, other) -> None:
    for open_ in (open_weights, open_averages):
        first, second = (open_(list_checkpoints(folder)[-1]) for folder in (run_folder, other))
        assert first.shapes == second.shapes
        a, b = (source.read(list(first.shapes)) for source in (first, second))
        for name in first.shapes:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def undivided(one_rank, shapes, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("undivided")
    run(one_rank, shapes, outputs, "one", 6)
    return outputs / "one"


def assert_same_numbers(run_folder, undivided) -> None:
    lines = metrics(run_folder)
    for line, expected in zip(lines, metrics(undivided)[lines[0]["step"] - 1 :], strict=False):
        assert {k: line[k] for k in ("step", "epoch", "samples", "tokens")}.items() <= expected.items()
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)


def test_layouts_go_over_into_each_other(undivided, one_rank, two_ranks, shapes, tmp_path):
    """One rank, then two that share sequences in either way, two that share layers, and one rank again."""
    run(two_ranks, shapes, tmp_path, "ring", 2, SEQUENCE)
    assert_same_numbers(tmp_path / "ring", undivided)
    run(two_ranks, shapes, tmp_path, "tensor", 4, TENSOR, load=tmp_path / "ring")
    assert_same_numbers(tmp_path / "tensor", undivided)
    run(one_rank, shapes, tmp_path, "one", 6, load=tmp_path / "tensor")
    assert_same_numbers(tmp_path / "one", undivided)
    assert_same_weights(tmp_path / "one", undivided)


@pytest.mark.slow
def test_a_zero_run_goes_on_with_heads_and_features_divided(undivided, two_ranks, four_ranks, shapes, tmp_path):
    checkpoint = list_checkpoints(undivided)[0]
    run(two_ranks, shapes, tmp_path, "heads", 4, HEADS, load=checkpoint)
    assert_same_numbers(tmp_path / "heads", undivided)
    run(four_ranks, shapes, tmp_path, "both", 6, TENSOR_SEQUENCE, load=tmp_path / "heads")
    assert_same_numbers(tmp_path / "both", undivided)
    assert_same_weights(tmp_path / "both", undivided)


@pytest.mark.parametrize(
    "plugin_config", [pytest.param(SEQUENCE, marks=pytest.mark.slow), TENSOR], ids=["sequence", "tensor"]
)
def test_a_divided_run_resumes_exactly(two_ranks, shapes, tmp_path, plugin_config):
    run(two_ranks, shapes, tmp_path, "whole", 4, plugin_config)
    run(two_ranks, shapes, tmp_path, "parts", 2, plugin_config)
    run(two_ranks, shapes, tmp_path, "parts", 4, plugin_config, load=tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
