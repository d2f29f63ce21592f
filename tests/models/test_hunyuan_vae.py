"""HunyuanVideo's autoencoder against the golden numbers of the reference, in every tiling, and its file's names."""

from __future__ import annotations

import copy
import json
import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from opensora.models.autoencoder import HunyuanVAE
from opensora.models.autoencoder.frame_causal import attend_by_frame
from opensora.models.autoencoder.fused_norm import NormSiLU
from opensora.models.autoencoder.tiles import TileSize
from opensora.models.frozen import build_frozen
from opensora.registry import AUTOENCODERS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FACTS = json.loads((GOLDEN / "hunyuan_vae_small.json").read_text())
SCALE = 0.476986
SMALL = FACTS["config"]
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hunyuan_vae_small.safetensors")


@pytest.fixture(scope="module")
def state(golden) -> dict[str, torch.Tensor]:
    return {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ckpts") / "hunyuan_vae.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def build(file):
    """build(dtype, **settings) -> the reference's small autoencoder, as a run builds it."""

    def build(dtype=torch.float32, **settings) -> HunyuanVAE:
        settings = {"type": "hunyuan_vae", "from_pretrained": file, **SMALL, **settings}
        return build_frozen(AUTOENCODERS, settings, "ae", dtype, "cpu")

    return build


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_names_and_shapes_are_those_of_the_published_file():
    manifest = json.loads((GOLDEN / "manifests" / "hunyuan_vae.json").read_text())
    with torch.device("meta"):
        vae = HunyuanVAE(device="meta").vae
    found = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert found == {name: shape for name, (shape, _) in manifest.items()}
    assert len(found) == 248 and sum(p.numel() for p in vae.parameters()) == 246_478_803


def settings_of(case: str) -> dict:
    over = dict(FACTS["cases"][case]["over"])
    return {"micro_batch_pixels": 1, **over} if over.pop("use_slicing", False) else over


@pytest.mark.parametrize("case", FACTS["cases"])
def test_it_equals_the_reference(case, build, golden):
    autoencoder = build(**settings_of(case))
    video = golden[f"{case}.x"]
    torch.testing.assert_close(autoencoder.moments(video), golden[f"{case}.moments"], **CLOSE)
    torch.testing.assert_close(autoencoder.encode(video), golden[f"{case}.z_mode"], **CLOSE)
    sampled = autoencoder.encode(video, lambda shape: normal(*shape, seed=5))
    torch.testing.assert_close(sampled, golden[f"{case}.z_sample_gen5"], **CLOSE)
    torch.testing.assert_close(autoencoder.decode(golden[f"{case}.z_mode"]), golden[f"{case}.dec"], **CLOSE)
    assert list(autoencoder.latent_size(video.shape[2:])) == FACTS["cases"][case]["latent_size"]


def test_tiles_are_those_of_the_reference_by_default():
    tiles = FACTS["real_config_tiles"]["inference/train"]
    with torch.device("meta"):
        autoencoder = HunyuanVAE(use_spatial_tiling=True, use_temporal_tiling=True, device="meta")
    assert autoencoder.tile == TileSize(tiles["tile_sample_min_size"], tiles["tile_sample_min_tsize"])
    assert autoencoder.latent_tile == TileSize(tiles["tile_latent_min_size"], tiles["tile_latent_min_tsize"])


def test_time_is_in_tiles_only_if_wanted(build, golden):
    """Uncut, 33 frames go through the network's parts as they are."""
    autoencoder = build()
    video = golden["temporal_tile.x"]
    assert video.shape[2] == 33
    whole = autoencoder.vae.quant_conv(autoencoder.vae.encoder(video))
    torch.testing.assert_close(autoencoder.moments(video), whole, **CLOSE)
    assert (whole - golden["temporal_tile.moments"]).abs().max() > 0.01
    z = normal(1, 4, 9, 2, 2)
    pixels = autoencoder.vae.decoder(autoencoder.vae.post_quant_conv(z))
    torch.testing.assert_close(autoencoder.reconstruct(z), pixels, **CLOSE)


def test_latents_are_scaled_samples_of_the_posterior(build, golden):
    """scale * (mean + exp(log variance / 2) * noise - shift), from the reference's moments; decode undoes it."""
    autoencoder = build(scale_factor=2.0, shift_factor=0.25)
    mean, log_variance = golden["video5.moments"].double().chunk(2, dim=1)
    drawn = []
    latents = autoencoder.encode(golden["video5.x"], lambda shape: drawn.append(shape) or torch.full(shape, -1.5))
    expected = 2 * (mean - 1.5 * torch.exp(log_variance / 2) - 0.25)
    torch.testing.assert_close(latents.double(), expected, **CLOSE)
    assert drawn == [latents.shape]
    decoded = autoencoder.decode(2 * (golden["video5.z_mode"] / SCALE - 0.25))
    torch.testing.assert_close(decoded, golden["video5.dec"], **CLOSE)


def test_extreme_variances_are_clamped(build, golden):
    autoencoder = build()
    autoencoder.moments = lambda video: torch.cat([torch.zeros(1, 4, 2, 4, 4), torch.full((1, 4, 2, 4, 4), 1e4)], 1)
    assert autoencoder.encode(golden["video5.x"], torch.ones).flatten()[0].item() == pytest.approx(SCALE * 22026.466)


# (tiled, whole tiles or clips within the limit) -> how many go through the network together, by size
SPLITS = {
    (False, 1): [[1] * 5],
    (False, 2): [[2, 2, 1]],
    (False, None): [[5]],
    (True, 1): [[1] * 10, [2] * 5, [1] * 5, [3, 2]],
    (True, 2): [[2] * 5, [4, 4, 2], [3, 2], [5]],
    (True, None): [[5, 5], [5, 5], [5], [5]],
}


@pytest.mark.parametrize("tiled, clips", SPLITS)
def test_micro_batches_change_memory_only(build, tiled, clips):
    """A tiled clip is two tiles of 17 x 32 x 24, two of 17 x 16 x 24, one of 9 x 32 x 24 and one of 9 x 16 x 24."""
    frames, height, width = (33, 40, 24) if tiled else (5, 16, 24)
    pixels = 17 * 32 * 24 if tiled else 5 * 16 * 24  # of a whole tile, of a clip
    video = normal(5, 3, frames, height, width)
    tiling = {"use_spatial_tiling": tiled, "use_temporal_tiling": tiled}
    autoencoder = build(micro_batch_pixels=clips and clips * pixels + 1, **tiling)
    seen = {"encoder": [], "decoder": []}
    for name, batches in seen.items():
        part = getattr(autoencoder.vae, name)
        part.register_forward_pre_hook(lambda _, args, batches=batches: batches.append(len(args[0])))
    latents = autoencoder.encode(video, lambda shape: normal(*shape, seed=1))
    decoded = autoencoder.decode(latents)
    assert seen["encoder"] == seen["decoder"] == list(chain(*SPLITS[tiled, clips]))
    at_once = build(micro_batch_pixels=None, **tiling)
    expected = at_once.encode(video, lambda shape: normal(*shape, seed=1))
    torch.testing.assert_close(latents, expected, **CLOSE)
    torch.testing.assert_close(decoded, at_once.decode(latents), **CLOSE)


def test_bf16(build, golden):
    autoencoder = build(torch.bfloat16)
    assert {p.dtype for p in autoencoder.parameters()} == {torch.bfloat16}
    latents = autoencoder.encode(golden["video5.x"].bfloat16(), lambda shape: torch.zeros(shape, dtype=torch.bfloat16))
    decoded = autoencoder.decode(golden["video5.z_mode"].bfloat16())
    assert latents.dtype == decoded.dtype == torch.bfloat16
    for found, name in ((latents, "z_mode"), (decoded, "dec")):
        expected = golden[f"video5.{name}"]
        assert (found.float() - expected).norm() / expected.norm() < 0.03


def test_training_drops_the_decoder(build, golden):
    autoencoder = build()
    before = sum(p.numel() for p in autoencoder.parameters())
    autoencoder.drop_decoder()
    assert sum(p.numel() for p in autoencoder.parameters()) < 0.6 * before
    torch.testing.assert_close(autoencoder.encode(golden["video5.x"]), golden["video5.z_mode"], **CLOSE)
    with pytest.raises(RuntimeError, match="decode after drop_decoder"):
        autoencoder.decode(golden["video5.z_mode"])


@pytest.mark.slow
def test_compiled(build, golden):
    """It changes nothing but the rounding, and two graphs do for images and videos of all sizes and lengths."""
    torch.compiler.reset()
    counters.clear()
    compiled, plain = build(compile=True), build()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, NormSiLU) for module in compiled.modules()) == 2 * (6 + 10) + 2
    for size in ((1, 5, 16, 24), (1, 1, 32, 24), (1, 9, 16, 16), (2, 5, 24, 16), (3, 1, 16, 16), (1, 13, 32, 40)):
        video = normal(size[0], 3, *size[1:])
        with torch.no_grad():
            latents = plain.encode(video)
            torch.testing.assert_close(compiled.encode(video), latents, **CLOSE)
            torch.testing.assert_close(compiled.decode(latents), plain.decode(latents), atol=1e-3, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("form", ["torch", "diffusers folder", "sharded folder"])
def test_other_files(form, build, state, golden, tmp_path):
    path = tmp_path / "vae"
    if form == "torch":
        path = tmp_path / "vae.pt"
        torch.save(state, path)
    else:
        build().vae.save_pretrained(path, max_shard_size="100KB" if "sharded" in form else "1GB")
        assert (len(list(path.glob("*.safetensors"))) > 1) == ("sharded" in form)
    autoencoder = build(from_pretrained=str(path))
    torch.testing.assert_close(autoencoder.encode(golden["video5.x"]), golden["video5.z_mode"], **CLOSE)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("quant_conv.bias"), "1 missing (quant_conv.bias)"),
        (lambda s: s.update(ema=torch.zeros(1)), "1 unexpected (ema)"),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(6)}), "1 mis-shaped (quant_conv.bias [6] instead of [8])"),
    ],
)
def test_weights_that_do_not_fit(change, complaint, build, state, tmp_path):
    changed = dict(state)
    change(changed)
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as error:
        build(from_pretrained=str(tmp_path / "other.safetensors"))
    assert complaint in str(error.value) and "does not fit hunyuan_vae" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_cut_or_absent(build, file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(file).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        build(from_pretrained=str(cut))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        build(from_pretrained=str(tmp_path / "none.safetensors"))


def test_without_a_file_the_weights_are_random_and_the_same_everywhere(build, caplog):
    logging.getLogger("opensora").addHandler(caplog.handler)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = build(from_pretrained=None)
    assert torch.equal(torch.rand(3), expected)  # what is drawn from the default generator is not disturbed
    other = build(from_pretrained=None)
    logging.getLogger("opensora").removeHandler(caplog.handler)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert "hunyuan_vae: from_pretrained is not set, so its weights are random" in caplog.text


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"block_out_channels": [8, 16, 16]}, r"block_out_channels=\[8, 16, 16\] must be 4 multiples of"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups=3"),
        ({"norm_num_groups": 0}, "norm_num_groups=0 must be at least 1"),
        ({"sample_size": 48}, "sample_size=48 must be a multiple of 32"),
        ({"sample_tsize": 0}, "sample_tsize=0 must be a multiple of 16"),
        ({"micro_batch_pixels": 0}, "micro_batch_pixels=0 must be at least 1, or None"),
    ],
)
def test_settings_that_cannot_be_used(settings, complaint, build):
    with pytest.raises(ValueError, match=complaint):
        build(**settings)


def test_sizes_that_do_not_fit(build):
    with pytest.raises(ValueError, match="20 x 16 pixels do not fit the autoencoder: give multiples of 8"):
        build().encode(torch.zeros(1, 3, 5, 20, 16))


def test_attention_by_frame_equals_attention_under_a_mask():
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    masked = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 64)).eval()
    by_frame = copy.deepcopy(masked)
    attend_by_frame(by_frame)
    for part in ("encoder", "decoder"):
        x = torch.randn(2, 64, 5, 3, 2)
        expected = getattr(masked, part).mid_block(x)
        torch.testing.assert_close(getattr(by_frame, part).mid_block(x), expected, atol=1e-5, rtol=1e-5)
