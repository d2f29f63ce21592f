from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from opensora.diffusion import conditions
from opensora.diffusion.conditions import build_condition, draw_condition

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "visual_condition.safetensors")


def toy_encode(video, causal):
    """The autoencoder that the golden data was made with: means over 4 x 8 x 8 blocks (a causal one keeps the first
    frame apart; an image is always its own frame); the fourth channel repeats the first."""
    space = F.avg_pool2d(video.flatten(0, 1), 8).unflatten(0, video.shape[:2])  # [B, 3, T, H/8, W/8]
    space = space.movedim(1, 2)  # [B, T, 3, h, w]
    alone = 1 if causal or space.shape[1] == 1 else 0
    groups = space[:, alone:]
    groups = groups[:, : groups.shape[1] // 4 * 4].unflatten(1, (-1, 4)).mean(2) if groups.shape[1] else groups
    latents = torch.cat([space[:, :alone], groups], dim=1).movedim(1, 2)
    return torch.cat([latents, latents[:, :1]], dim=1)  # [B, 4, t, h, w]


@pytest.mark.parametrize("name", conditions.CONDITIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "uncausal"])
def test_build_condition_equals_golden(name, causal):
    prefix = f"{'causal' if causal else 'uncausal'}.{name}"
    video = GOLDEN["x73"]
    latents = toy_encode(video, causal)
    assert torch.allclose(latents, GOLDEN[f"{prefix}.x0"], atol=1e-6)
    built = build_condition(video, latents, [name] * 2, lambda frames, _: toy_encode(frames, causal), causal)
    assert built.shape == GOLDEN[f"{prefix}.cond"].shape
    assert torch.allclose(built, GOLDEN[f"{prefix}.cond"], atol=1e-6)
    assert torch.equal(built[:, :1], GOLDEN[f"{prefix}.cond"][:, :1])


def test_samples_of_a_batch_have_their_own_conditions():
    video = torch.randn(4, 3, 37, 16, 16)
    latents = toy_encode(video, True)
    names = ["i2v_loop", "t2v", "v2v_head", "i2v_head"]
    together = build_condition(video, latents, names, lambda frames, _: toy_encode(frames, True))
    for i, name in enumerate(names):
        one = slice(i, i + 1)
        alone = build_condition(video[one], latents[one], [name], lambda frames, _: toy_encode(frames, True))
        assert torch.equal(together[one], alone)


def test_encode_is_told_which_samples_it_encodes():
    video = torch.randn(3, 3, 9, 16, 16)
    seen = []

    def encode(frames, samples):
        assert torch.equal(frames, video[samples][:, :, : frames.shape[2]] if not seen else video[samples][:, :, -1:])
        seen.append(list(samples))
        return toy_encode(frames, True)

    build_condition(video, toy_encode(video, True), ["i2v_loop", "i2v_tail", "i2v_head"], encode)
    assert seen == [[0, 2], [0, 1]]


def test_images_are_given_nothing():
    image = torch.randn(2, 3, 1, 16, 16)
    built = build_condition(image, toy_encode(image, True), ["i2v_head", "t2v"], lambda frames, _: 1 / 0)
    assert built.shape == (2, 5, 1, 2, 2) and not built.any()


def test_draw_is_weighted():
    config = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    drawn = Counter(draw_condition(config, 33, i / 8000) for i in range(8000))
    assert drawn == {"t2v": 1000, "i2v_head": 5000, "i2v_loop": 1000, "i2v_tail": 1000}


def test_draw_leaves_out_what_does_not_fit_and_keeps_the_config():
    config = {"v2v_head": 1, "v2v_tail_easy": 1, "i2v_head": 2, "t2v": 0}
    before = dict(config)
    draws = [i / 1000 for i in range(1000)]
    assert {draw_condition(config, 1, u) for u in draws} == {"t2v"}
    assert {draw_condition(config, 29, u) for u in draws} == {"i2v_head"}
    assert Counter(draw_condition(config, 33, u) for u in draws) == {"v2v_head": 333 + 1, "i2v_head": 666}
    assert {draw_condition(config, 65, u) for u in draws} == {"v2v_head", "v2v_tail_easy", "i2v_head"}
    assert {draw_condition({"v2v_head": 1}, 5, u) for u in draws} == {"t2v"}
    assert config == before


@pytest.mark.parametrize(
    ("config", "message"),
    [({"i2v_hed": 1}, "i2v_hed"), ({"t2v": -1}, "t2v=-1"), ({"t2v": 0}, "no condition"), ({}, "no condition")],
)
def test_bad_condition_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        conditions.check_condition_config(config)
