import itertools

import torch

from opensora.diffusion.flow import SIGMA_MIN, euler_step, flow_matching_loss, interpolate, velocity_target


def test_path_runs_from_data_to_noise():
    data, noise = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    assert torch.equal(interpolate(data, noise, torch.ones(2)), noise)
    assert torch.allclose(interpolate(data, noise, torch.zeros(2)), data + SIGMA_MIN * noise, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
    data, noise = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (interpolate(data, noise, t + 1e-4) - interpolate(data, noise, t - 1e-4)) / 2e-4
    assert torch.allclose(slope, velocity_target(data, noise), atol=1e-9)


def test_bf16_path_is_computed_in_bf16_from_the_rounded_time():
    data, noise = torch.randn(4, 6, 8).bfloat16(), torch.randn(4, 6, 8).bfloat16()
    t = torch.tensor([0.0, 0.3, 0.77, 1.0]).bfloat16()
    r = 1 - t
    expected = r[:, None, None] * data + (1 - (1 - 1e-5) * r)[:, None, None] * noise
    got = interpolate(data, noise, t)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_loss_is_the_fp32_mean_over_all_elements():
    prediction, target = torch.randn(2, 5, 3).bfloat16(), torch.randn(2, 5, 3).bfloat16()
    loss = flow_matching_loss(prediction, target)
    expected = sum((p - q) ** 2 for p, q in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected / 30) < 1e-5


def test_euler_with_the_exact_velocity_arrives_at_the_data():
    data, noise = torch.randn(2, 4), torch.randn(2, 4)
    x, times = noise, [1.0, 0.9, 0.4, 0.0]
    for t, t_next in itertools.pairwise(times):
        x = euler_step(x, velocity_target(data, noise), t, t_next)
    assert torch.allclose(x, data, atol=1e-4)
