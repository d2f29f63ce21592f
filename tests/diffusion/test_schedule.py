import json
import math
from pathlib import Path

import pytest
import torch

from opensora.diffusion import schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())


def test_linear_by_tokens_equals_golden():
    golden = GOLDEN["get_res_lin_function"]
    for tokens, expected in golden["values"].items():
        assert schedule.linear_by_tokens(int(tokens)) == pytest.approx(expected, abs=1e-12)
    assert schedule.linear_by_tokens(1024, y1=1, y2=2) == pytest.approx(golden["y1=1,y2=2 at 1024"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["time_shift"], ids=lambda case: str(case["alpha"]))
def test_time_shift_equals_golden(case):
    shifted = schedule.time_shift(case["alpha"], torch.tensor(case["t"]))
    assert torch.allclose(shifted, torch.tensor(case["out"]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN["train_shift_alpha"], ids=lambda case: str(case["latent_thw"]))
def test_training_shift_equals_golden(case):
    assert schedule.training_shift_alpha(tuple(case["latent_thw"])) == pytest.approx(case["alpha"], rel=1e-12)


@pytest.mark.parametrize("case", GOLDEN["get_schedule"], ids=lambda case: str(case["image_seq_len"]))
def test_sampling_schedule_equals_golden(case):
    times = schedule.sampling_schedule(case["num_steps"], case["image_seq_len"], case["num_frames"], **case["kw"])
    assert times == pytest.approx(case["out"], abs=1e-6)
    assert times[0] == 1.0 and times[-1] == 0.0


def test_schedule_without_shift_is_even_and_alpha_replaces_the_estimate():
    assert schedule.sampling_schedule(4, 4096, 33, shift=False) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule.sampling_schedule(2, 4096, 33, alpha=3.0)[1] == pytest.approx(0.75)


def test_training_timesteps_follow_the_shifted_logit_normal():
    normal = torch.tensor([-1.0, 0.0, 2.0])
    alpha = schedule.training_shift_alpha((9, 32, 32))
    got = schedule.training_timesteps(normal, (9, 32, 32), torch.float32)
    for z, t in zip(normal.tolist(), got.tolist(), strict=True):
        s = 1 / (1 + math.exp(-z))
        assert t == pytest.approx(alpha * s / (1 + (alpha - 1) * s), rel=1e-6)
    assert torch.equal(schedule.training_timesteps(normal, (9, 32, 32), torch.bfloat16), got.bfloat16())
