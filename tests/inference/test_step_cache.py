"""Velocities that are used again, against a formula whose changes are known, and against sampling without the cache."""

import math

import pytest
import torch

from opensora.inference.sampler import Sampler, SamplerOptions, TextEmbedding
from opensora.inference.step_cache import StepCache

LATENT = (4, 3, 4, 6)  # C, T, H, W


class Velocity:
    """v = exp(rate * mean(x)) for each sample, everywhere: it changes by about rate * change of x."""

    def __init__(self, rates):
        self.rates, self.calls = torch.tensor(rates), []

    def __call__(self, x, t, branch, rows):
        rows = torch.arange(len(self.rates)) if rows is None else rows
        self.calls.append((branch, rows.tolist()))
        return torch.exp(self.rates[rows, None, None] * x.mean(dim=(1, 2), keepdim=True)).expand_as(x)


def at(position, batch=1):
    return torch.full((batch, 2, 3), float(position))


def test_the_third_call_is_left_out_where_the_change_is_below_the_threshold():
    for threshold, expected in ((0.5, 2), (0.05, 3)):
        velocity = Velocity([1.0])
        cache = StepCache(velocity, threshold)
        values = [cache(at(x), t, "full").mean().item() for x, t in ((0.0, 1.0), (0.1, 0.9), (0.2, 0.8))]
        assert len(velocity.calls) == expected  # exp(0.2) is 11 % more than exp(0.1)
        assert values[2] == pytest.approx(math.exp(0.1 if expected == 2 else 0.2))
        assert cache.reused == pytest.approx(1 - expected / 3)


def test_changes_add_up_from_the_last_computed_call():
    velocity = Velocity([1.0])
    cache = StepCache(velocity, 0.25)
    for i in range(11):
        cache(at(i / 10), 1 - i / 10, "full")
    computed = len(velocity.calls)
    assert 5 <= computed <= 6  # the first two, then every third of the 0.1 apart ones: 0.11, 0.21, then 0.32 > 0.25


def test_each_sample_and_each_branch_decides_for_itself():
    velocity = Velocity([0.0, 5.0])
    cache = StepCache(velocity, 0.1)
    for x in (0.0, 0.1, 0.2):
        for branch in ("full", "neither"):
            cache(at(x, batch=2), 1 - x, branch)
    assert velocity.calls == [(branch, rows) for rows in ([0, 1], [0, 1], [1]) for branch in ("full", "neither")]


def test_without_a_threshold_or_with_0_every_call_is_computed():
    for threshold in (None, 0.0):
        velocity = Velocity([0.0])
        cache = StepCache(velocity, threshold)
        for x in (0.0, 0.1, 0.2, 0.3):
            cache(at(x), 1 - x, "full")
        assert len(velocity.calls) == 4 and cache.reused == 0


def test_latents_that_stand_still_are_computed_not_divided_by():
    cache = StepCache(Velocity([1.0]), 0.1)
    assert all(cache(at(1.0), t, "full").isfinite().all() for t in (1.0, 0.9, 0.8))


def sample(model, step_cache, batch=slice(None), text_osci=True, image_osci=True):
    generator = torch.Generator().manual_seed(0)
    noise, tokens, vector = (torch.randn(3, *shape, generator=generator) for shape in (LATENT, (5, 12), (8,)))
    condition = torch.zeros(3, 1 + LATENT[0], *LATENT[1:])
    condition[:2, :, 0] = 1
    options = SamplerOptions(
        num_steps=24, guidance=2.0, guidance_img=1.5, text_osci=text_osci, image_osci=image_osci, step_cache=step_cache
    )
    sampler = Sampler(model, options, torch.float32)
    text, negative = TextEmbedding(tokens, vector), TextEmbedding(tokens.flip(0) * 0.5, vector.flip(0))
    rows = torch.arange(3)[batch]
    latents = sampler(noise[rows], text.rows(rows), negative.rows(rows), condition[rows])
    return latents, sampler.reused


@pytest.fixture
def smooth_mmdit(tiny_mmdit):
    """Its velocities change slowly, as those of trained models do."""
    model = tiny_mmdit()
    for parameter in model.parameters():
        parameter.mul_(0.3)
    return model


def test_the_error_of_samples_grows_with_the_threshold_and_is_below_it(smooth_mmdit):
    exact, _ = sample(smooth_mmdit, None)
    errors, shares = [], []
    for threshold in (0.0, 0.05, 0.2):
        latents, reused = sample(smooth_mmdit, threshold)
        errors.append(((latents - exact).abs().mean() / exact.abs().mean()).item())
        shares.append(reused)
    assert errors[0] < 1e-5 < errors[1] < 0.05 and errors[1] < errors[2] < 0.2
    assert shares[0] == 0 and 0.3 < shares[1] < shares[2]


def test_of_a_model_that_jumps_nothing_is_used_again(tiny_mmdit):
    latents, reused = sample(tiny_mmdit(), 0.1)
    assert reused == 0 and torch.allclose(latents, sample(tiny_mmdit(), None)[0], atol=1e-4)


@pytest.mark.parametrize("text_osci", [False, True])
@pytest.mark.parametrize("image_osci", [False, True])
def test_a_sample_does_not_depend_on_its_batch(smooth_mmdit, text_osci, image_osci):
    """Nor the third, without a reference, on others': they need velocities, at some steps, that it does not."""
    together, shared = sample(smooth_mmdit, 0.1, slice(None), text_osci, image_osci)
    for i in range(3):
        alone, reused = sample(smooth_mmdit, 0.1, slice(i, i + 1), text_osci, image_osci)
        assert reused > 0 and torch.allclose(alone[0], together[i], atol=1e-5)
    assert shared > 0
