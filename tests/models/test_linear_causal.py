"""The linear autoencoder against its definition, on clips of a moving disc."""

import math

import pytest
import torch

from opensora.models.autoencoder import LinearCausal
from opensora.registry import AUTOENCODERS


def clips(number: int, frames: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Discs that move, [number, 3, frames, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    place, speed, colour = (torch.rand(number, n, generator=generator) for n in (2, 2, 3))
    grid = torch.arange(size) + 0.5
    centre = size * (0.3 + 0.4 * place)[:, None] + (4 * speed - 2)[:, None] * torch.arange(frames)[:, None]  # [N, T, 2]
    distance = torch.hypot(grid - centre[..., :1, None], grid[:, None] - centre[..., 1:, None])  # [N, T, H, W]
    mask = (6.5 - distance).clamp(0, 1)
    return mask[:, None] * (1.8 * colour + 0.1)[:, :, None, None, None] - 0.9


@pytest.fixture(scope="module")
def fitted() -> LinearCausal:
    autoencoder = LinearCausal()
    autoencoder.fit([clips(160, 9), clips(20, 5, seed=1), clips(20, 1, seed=2)])
    return autoencoder


def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(4 / (one - other).square().mean().item())


@pytest.mark.parametrize("frames, latent_frames", [(1, 1), (5, 2), (9, 3), (33, 9)])
def test_sizes(fitted, frames, latent_frames):
    video = torch.zeros(2, 3, frames, 16, 24)
    latents = fitted.encode(video, noise=None)
    assert latents.shape == (2, 16, latent_frames, 2, 3)
    assert fitted.latent_size((frames, 16, 24)) == (latent_frames, 2, 3)
    assert fitted.decode(latents).shape == video.shape


@pytest.mark.parametrize("size", [(4, 16, 16), (9, 20, 16), (9, 16, 12)])
def test_sizes_that_do_not_fit(fitted, size):
    with pytest.raises(ValueError, match="does not fit the autoencoder"):
        fitted.encode(torch.zeros(1, 3, *size))


def test_unseen_clips_come_back(fitted):
    video = clips(40, 9, seed=3)
    assert decibels(fitted.decode(fitted.encode(video)), video) > 24  # the demo's own clips: test_demo_assets.py


def test_encode_and_decode_equal_the_definition(fitted):
    """Block by block, as loops: z = components (block - origin) / scale, and back."""
    video = clips(1, 5, seed=4, size=16)
    latents = fitted.encode(video)
    decoded = fitted.decode(latents)
    for frames, codec, t in ((slice(0, 1), fitted.first, 0), (slice(1, 5), fitted.rest, 1)):
        for row in range(2):
            for column in range(2):
                window = (0, slice(None), frames, slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                block = video[window].reshape(-1)
                z = torch.stack([c @ (block - codec.origin) for c in codec.components]) / codec.scale
                torch.testing.assert_close(latents[0, :, t, row, column], z, atol=1e-4, rtol=1e-4)
                back = sum(v * s * c for v, s, c in zip(z, codec.scale, codec.components, strict=True)) + codec.origin
                torch.testing.assert_close(decoded[window].reshape(-1), back, atol=1e-4, rtol=1e-4)


def test_components_span_the_principal_subspace(fitted):
    """Independent: no other 16 directions hold more of the energy than the leading singular vectors."""
    blocks = clips(160, 9)[:, :, 1:].unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8)  # [N, c, t, h, w, 4, 8, 8]
    blocks = blocks.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 768) - fitted.rest.origin
    best = torch.linalg.svdvals(blocks.double())[:16].square().sum()
    kept = (blocks.double() @ fitted.rest.components.double().T).square().sum()
    assert kept / best == pytest.approx(1, abs=2e-3)  # the fit saw a few more clips
    identity = fitted.rest.components @ fitted.rest.components.T
    torch.testing.assert_close(identity, torch.eye(16), atol=1e-5, rtol=0)


def test_training_may_drop_the_decoder(fitted):
    latents = fitted.encode(clips(1, 5, seed=9))
    expected = fitted.decode(latents)
    fitted.drop_decoder()
    assert torch.equal(fitted.decode(latents), expected)


def test_it_is_causal(fitted):
    video = clips(2, 9, seed=5)
    other = video.clone()
    other[:, :, 5:] = 0.3
    before, after = fitted.encode(video), fitted.encode(other)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])
    assert torch.allclose(fitted.encode(video[:, :, :1]), before[:, :, :1])


def test_background_is_zero_and_latents_are_of_unit_size(fitted):
    empty = torch.full((1, 3, 9, 16, 16), -0.9)
    assert fitted.encode(empty).abs().max() < 1e-3
    latents = fitted.encode(clips(60, 9, seed=6))
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)


def test_a_still_picture_has_the_same_latents_in_every_frame(fitted):
    still = clips(40, 1, seed=7).expand(-1, -1, 5, -1, -1)
    first, second = fitted.encode(still).unbind(2)  # [N, C, h, w]
    strong = first.square().mean((0, 2, 3)) > 0.5  # of the weak channels, some hold motion
    assert strong.sum() >= 5
    for one, other in zip(first[:, strong].unbind(1), second[:, strong].unbind(1), strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98
        assert other.std() / one.std() == pytest.approx(1, abs=0.1)


def test_fit_is_deterministic_and_a_file_brings_it_back(fitted, tmp_path):
    again = LinearCausal()
    again.fit([clips(160, 9), clips(20, 5, seed=1), clips(20, 1, seed=2)])
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    path = tmp_path / "new" / "ae.safetensors"
    fitted.save(path)
    loaded = AUTOENCODERS.build({"type": "linear_causal", "from_pretrained": str(path)}, where="ae")
    video = clips(2, 5, seed=8)
    assert torch.equal(loaded.encode(video), fitted.encode(video))


def test_files_that_do_not_fit(fitted, tmp_path):
    path = tmp_path / "ae.safetensors"
    with pytest.raises(FileNotFoundError, match=r"ae\.from_pretrained=.*make_shapes"):
        LinearCausal(str(path))
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match=r"ae\.from_pretrained=") as error:
        LinearCausal(str(path))
    assert "\n" not in str(error.value)
    fitted.save(path)
    with pytest.raises(ValueError, match=r"and 8 of latents") as error:
        LinearCausal(str(path), latent_channels=8)
    assert "\n" not in str(error.value)
