import itertools

import pytest
import torch
from torch import nn

from opensora.diffusion.guidance import oscillate
from opensora.diffusion.schedule import sampling_schedule
from opensora.diffusion.tokens import pack, position_ids, text_position_ids, unpack
from opensora.inference.sampler import Sampler, SamplerOptions, TextEmbedding

LATENT = (4, 3, 4, 6)  # C, T, H, W


def texts(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return TextEmbedding(torch.randn(batch, 5, 12, generator=generator), torch.randn(batch, 8, generator=generator))


def head_condition(batch):
    condition = torch.zeros(batch, 1 + LATENT[0], *LATENT[1:])
    condition[:, :, 0] = torch.randn(batch, 1 + LATENT[0], *LATENT[2:])
    condition[:, 0, 0] = 1
    return condition


class CountingModel(nn.Module):
    """Velocity by a formula; counts its calls."""

    cond_embed, guidance_embed, patch_size = False, False, 2

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.calls, self.seen = velocity, 0, []

    def forward(self, img, timesteps, **inputs):
        self.calls += 1
        self.seen.append((img.dtype, timesteps))
        return self.velocity(img, timesteps)


def three_branch_reference(model, options, noise, text, negative, condition, temporal=True):
    """Spec 10 as it is written: always three velocities a step, in one batch."""
    batch, _, *size = noise.shape
    x = pack(noise, 2)
    inputs = {
        "img_ids": position_ids(3 * batch, tuple(size), 2),
        "txt": torch.cat([text.tokens, negative.tokens, negative.tokens]),
        "txt_ids": text_position_ids(3 * batch, text.tokens.shape[1]),
        "y_vec": torch.cat([text.vector, negative.vector, negative.vector]),
        "cond": pack(torch.cat([condition, condition, torch.zeros_like(condition)]), 2),
    }
    times = sampling_schedule(options.num_steps, size[1] * size[2] // 4, size[0])
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        c, u, u2 = model(img=torch.cat([x, x, x]), timesteps=torch.full((3 * batch,), t), **inputs).chunk(3)
        gt = oscillate(options.guidance, i) if options.text_osci else options.guidance
        gi = oscillate(options.guidance_img, i) if options.image_osci else options.guidance_img
        if gi > 1 and options.scale_temporal_osci and temporal:
            last = torch.linspace(gi, 1.0, options.num_steps + 1)[i]
            gi = pack(torch.linspace(1.0, last, size[0])[None, None, :, None, None].expand(noise.shape), 2)
        x = x + (t_next - t) * (u2 + gi * (u - u2) + gt * (c - u))
    x = unpack(x, tuple(size), 2)
    return torch.where(condition[:, :1] > 0, condition[:, 1:], x)


@pytest.mark.parametrize("with_reference", [True, False], ids=["i2v", "t2v"])
@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "flat"])
def test_fewer_branches_equal_the_three_branch_algorithm(tiny_mmdit, with_reference, temporal):
    options = SamplerOptions(
        num_steps=12, guidance=3.0, guidance_img=2.0, text_osci=True, image_osci=True, scale_temporal_osci=temporal
    )
    model, noise = tiny_mmdit(), torch.randn(2, *LATENT)
    condition = head_condition(2) if with_reference else torch.zeros(2, 1 + LATENT[0], *LATENT[1:])
    got = Sampler(model, options, torch.float32)(noise, texts(2, 1), texts(2, 2), condition)
    expected = three_branch_reference(model, options, noise, texts(2, 1), texts(2, 2), condition)
    assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(got, noise, atol=0.1)


def test_the_scale_rises_for_image_to_video_alone(tiny_mmdit):
    options = SamplerOptions(num_steps=12, guidance=3.0, guidance_img=2.0, scale_temporal_osci=True)
    model, noise, condition = tiny_mmdit(), torch.randn(2, *LATENT), head_condition(2)
    given = (noise, texts(2, 1), texts(2, 2), condition)
    got = Sampler(model, options, torch.float32)(*given, rising=torch.tensor([True, False]))
    rises, stays = (three_branch_reference(model, options, *given, temporal) for temporal in (True, False))
    assert torch.allclose(got, torch.stack([rises[0], stays[1]]), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(rises[1], stays[1], atol=1e-2)


def test_only_what_the_scales_need_is_computed():
    guided = SamplerOptions(num_steps=14, guidance=7.5, guidance_img=3.0, text_osci=True, image_osci=True)

    def calls(options=guided, negative=2, condition=None):
        model = CountingModel(lambda x, t: x)
        sampler = Sampler(model, options, torch.float32)
        sampler(torch.randn(1, *LATENT), texts(1, 1), texts(1, negative), condition)
        return model.calls

    assert calls() == 2 * 14 - 2  # steps 11 and 13 have no guidance
    assert calls(condition=head_condition(1)) == 3 * 14 - 2 * 2
    assert calls(SamplerOptions(num_steps=14, method="distill")) == 14
    assert calls(negative=1) == 14  # the negative prompt is the prompt
    assert calls(negative=1, condition=head_condition(1)) == 2 * 14 - 2


@pytest.mark.parametrize("with_reference", [True, False], ids=["i2v", "t2v"])
def test_a_negative_prompt_that_is_the_prompt_changes_nothing(tiny_mmdit, with_reference):
    options = SamplerOptions(num_steps=12, guidance=3.0, guidance_img=2.0, text_osci=True, scale_temporal_osci=True)
    model, noise = tiny_mmdit(), torch.randn(2, *LATENT)
    condition = head_condition(2) if with_reference else torch.zeros(2, 1 + LATENT[0], *LATENT[1:])
    got = Sampler(model, options, torch.float32)(noise, texts(2, 1), texts(2, 1), condition)
    expected = three_branch_reference(model, options, noise, texts(2, 1), texts(2, 1), condition)
    assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4)


def test_zero_velocity_leaves_the_noise():
    noise = torch.randn(2, *LATENT)
    model = CountingModel(lambda x, t: torch.zeros_like(x))
    assert torch.equal(
        Sampler(model, SamplerOptions(num_steps=5), torch.float32)(noise, texts(2, 1), texts(2, 2)), noise
    )


def test_exact_velocity_recovers_the_data_in_bf16_too():
    data, noise = torch.randn(2, *LATENT), torch.randn(2, *LATENT)
    velocity = pack(noise - data, 2)
    model = CountingModel(lambda x, t: velocity)
    for dtype in (torch.float32, torch.bfloat16):
        got = Sampler(model, SamplerOptions(num_steps=50), dtype)(noise, texts(2, 1), texts(2, 2))
        assert torch.allclose(got, data, atol=1e-4)  # the state is fp32 whatever the model's dtype
        assert model.seen[-1][0] == model.seen[-1][1].dtype == dtype


def test_given_latents_stand_in_every_sample(tiny_mmdit):
    condition = head_condition(3)
    got = Sampler(tiny_mmdit(), SamplerOptions(num_steps=2), torch.float32)(
        torch.randn(3, *LATENT), texts(3, 1), texts(3, 2), condition
    )
    assert torch.equal(got[:, :, 0], condition[:, 1:, 0])
    assert got[:, :, 1:].abs().min() > 0


def test_a_sample_does_not_depend_on_its_batch(tiny_mmdit):
    model, noise, condition = tiny_mmdit(), torch.randn(3, *LATENT), head_condition(3)
    condition[1] = 0  # the one without a reference
    text, negative = texts(3, 1), texts(3, 2)
    sampler = Sampler(model, SamplerOptions(num_steps=4, guidance=3.0, guidance_img=2.0), torch.float32)
    together = sampler(noise, text, negative, condition)
    for i in range(3):
        one = slice(i, i + 1)
        alone = sampler(
            noise[one],
            TextEmbedding(text.tokens[one], text.vector[one]),
            TextEmbedding(negative.tokens[one], negative.vector[one]),
            condition[one],
        )
        assert torch.allclose(alone, together[one], atol=1e-4)


def test_a_velocity_is_computed_for_the_samples_that_need_it():
    rows = []
    model = CountingModel(lambda x, t: rows.append(len(x)) or torch.zeros_like(x))
    model.cond_embed = True
    condition = head_condition(3)
    condition[1] = 0
    text, negative = texts(3, 1), texts(3, 2)
    negative.tokens[2], negative.vector[2] = text.tokens[2], text.vector[2]  # not guided by its text
    options = SamplerOptions(num_steps=1, guidance=3.0, guidance_img=2.0)
    Sampler(model, options, torch.float32)(torch.randn(3, *LATENT), text, negative, condition)
    assert rows == [3, 2, 2]  # all; of the first two without their texts; of the first and the third without anything


def test_schedule_depends_on_tokens_of_the_models_patch_and_latent_frames():
    model = CountingModel(lambda x, t: x)
    sampler = Sampler(model, SamplerOptions(num_steps=5), torch.float32)
    assert sampler.times((33, 96, 96)) == sampling_schedule(5, 2304, 33)
    model.patch_size = 1
    assert Sampler(model, SamplerOptions(num_steps=5), torch.float32).times((33, 48, 48)) == sampler.times((33, 96, 96))
    linear = Sampler(model, SamplerOptions(num_steps=4, shift=False), torch.float32)
    assert linear.times((33, 96, 96)) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("bad", [{"method": "ddim"}, {"num_steps": 0}])
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match=f"sampling_option.{next(iter(bad))}="):
        SamplerOptions.from_config(bad)


def test_options_take_their_part_of_sampling_option():
    options = SamplerOptions.from_config({"resolution": "256px", "num_steps": 3, "guidance": 2.0, "flow_shift": 3.0})
    assert (options.num_steps, options.guidance, options.flow_shift) == (3, 2.0, 3.0)
