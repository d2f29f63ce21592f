import numpy as np
import pytest
import torch
from PIL import Image

from opensora.diffusion.random import derive_seed
from opensora.inference.output import write_mp4
from opensora.inference.pipeline import Request


def png(path, colour, size=(48, 32)):
    Image.new("RGB", size, colour).save(path)
    return str(path)


def requests(count, **fields):
    return [Request(text=f"prompt {i}", seed=derive_seed(0, i, 0), **fields) for i in range(count)]


@pytest.mark.parametrize("condition", ["t2v", "i2v_head", "i2v_loop"])
def test_a_sample_does_not_depend_on_its_batch(toy_pipeline, noisy_autoencoder, tmp_path, condition):
    references = (png(tmp_path / "a.png", (200, 40, 90)), png(tmp_path / "b.png", (0, 240, 10)))
    pipeline = toy_pipeline(noisy_autoencoder)
    asked = requests(3, condition=condition, references=references, negative="bad")
    together = pipeline.sample_latents(asked)
    for i, request in enumerate(asked):
        assert torch.allclose(pipeline.sample_latents([request])[0], together[i], atol=1e-4)
    assert torch.equal(together, pipeline.sample_latents(asked))
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_references_stand_where_the_condition_puts_them(toy_pipeline, tmp_path):
    red, blue = png(tmp_path / "red.png", (255, 0, 0)), png(tmp_path / "blue.png", (0, 0, 255))
    pipeline = toy_pipeline()
    asked = [
        Request("a", 1, condition="i2v_head", references=(red, blue)),
        Request("b", 2, condition="i2v_tail", references=(red, blue)),
        Request("c", 3, condition="i2v_loop", references=(red, blue)),
        Request("d", 4, condition="i2v_loop", references=(red,)),
        Request("e", 5),
    ]
    latents = pipeline.sample_latents(asked)[:, :3].mean(dim=(3, 4))  # [B, 3, T]
    red, blue = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, 1.0])
    close = lambda x, y: torch.allclose(x, y, atol=1e-5)  # noqa: E731
    assert close(latents[0, :, 0], red) and not close(latents[0, :, -1], blue)
    assert close(latents[1, :, -1], blue) and not close(latents[1, :, 0], red)
    assert close(latents[2, :, 0], red) and close(latents[2, :, -1], blue)
    assert close(latents[3, :, 0], red) and close(latents[3, :, -1], red)
    assert not close(latents[4, :, 0], red) and not close(latents[4, :, -1], red)


def test_a_video_gives_its_first_or_its_last_frame(toy_pipeline, tmp_path):
    grey = torch.linspace(0, 255, 12).round().to(torch.uint8)
    write_mp4(tmp_path / "ramp.mp4", grey[:, None, None, None].expand(12, 32, 48, 3), 8, crf=1)
    reference = (str(tmp_path / "ramp.mp4"),)
    pipeline = toy_pipeline()
    asked = [Request("a", 1, condition=f"i2v_{end}", references=reference) for end in ("head", "tail")]
    latents = pipeline.sample_latents(asked)[:, :3].mean(dim=(1, 3, 4))  # [B, T]
    assert latents[0, 0] == pytest.approx(-1, abs=0.05) and latents[1, -1] == pytest.approx(1, abs=0.05)


def test_v2v_gives_33_frames(toy_pipeline, tmp_path):
    grey = (torch.arange(40) * 6).to(torch.uint8)
    write_mp4(tmp_path / "ramp.mp4", grey[:, None, None, None].expand(40, 32, 48, 3), 8, crf=1)
    pipeline = toy_pipeline(num_frames=41)
    (latents,) = pipeline.sample_latents(
        [Request("a", 1, condition="v2v_tail", references=(str(tmp_path / "ramp.mp4"),))]
    )
    expected = grey[7:].float() / 127.5 - 1
    expected = torch.cat([expected[:1], expected[1:].view(8, 4).mean(1)])
    assert torch.allclose(latents[:3].mean(dim=(0, 2, 3))[-9:], expected, atol=0.05)


def test_noise_is_the_seeds_and_a_model_that_stands_still_decodes_it(toy_pipeline, tiny_mmdit):
    model = tiny_mmdit()
    for parameter in model.final_layer.parameters():
        torch.nn.init.zeros_(parameter)
    pipeline = toy_pipeline(model=model)
    first, again, other = pipeline([Request("a", 1), Request("b", 1), Request("a", 2)])
    assert first.shape == (9, 32, 48, 3) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)
    latents = pipeline.sample_latents([Request("a", 1)])
    assert 0.9 < latents.std() < 1.1


def test_models_without_cond_embed_take_no_condition(toy_pipeline, tiny_mmdit):
    pipeline = toy_pipeline(model=tiny_mmdit(cond_embed=False))
    assert pipeline.sample_latents(requests(1)).shape == (1, 4, 3, 4, 6)


def test_each_distinct_text_is_encoded_once(toy_pipeline):
    pipeline = toy_pipeline()
    pipeline.sample_latents([Request("a", 1), Request("b", 2), Request("a", 3)])
    assert sorted(pipeline.t5.encoded) == ["", "a", "b"]


def test_on_step_is_called_after_every_step(toy_pipeline):
    steps = []
    toy_pipeline(num_steps=4)(requests(2), lambda: steps.append(1))
    assert len(steps) == 4


def test_images_are_one_frame(toy_pipeline):
    (image,) = toy_pipeline(num_frames=1)(requests(1))
    assert image.shape == (1, 32, 48, 3)
    assert np.asarray(image).std() > 0


def test_a_model_for_other_latents_is_named(toy_pipeline, tiny_mmdit):
    with pytest.raises(ValueError, match=r"model.in_channels=64 .* 4 latent channels in 2 x 2 patches make 16"):
        toy_pipeline(model=tiny_mmdit(in_channels=64))
