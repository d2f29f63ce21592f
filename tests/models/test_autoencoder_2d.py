"""FLUX's image autoencoder against a naive one that is written from its formulas, under its file's own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from opensora.models.autoencoder import Autoencoder2D
from opensora.models.autoencoder.flux_2d import to_diffusers, to_original
from opensora.models.frozen import build_frozen
from opensora.models.weight_files import WeightSource, open_weights
from opensora.registry import AUTOENCODERS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MANIFEST = {name: shape for name, (shape, _) in json.loads((GOLDEN / "manifests/flux_ae.json").read_text()).items()}
CH = 32  # a quarter of the published width
SCALE, SHIFT = 0.3611, 0.1159
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights under the published names, with a quarter of the channels."""
    generator = torch.Generator().manual_seed(0)

    def weight(name, shape):
        noise = torch.randn([n // 4 if n >= 128 else n for n in shape], generator=generator)
        if "norm" in name:
            return (1 if name.endswith("weight") else 0) + 0.1 * noise
        return noise / max(1, noise[0].numel()) ** 0.5

    return {name: weight(name, shape) for name, shape in MANIFEST.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ckpts") / "flux1-dev-ae.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def build(file):
    """build(dtype, **settings) -> the autoencoder with the random weights, as a run builds it."""

    def build(dtype=torch.float32, **settings) -> Autoencoder2D:
        settings = {"type": "autoencoder_2d", "from_pretrained": file, "ch": CH, **settings}
        return build_frozen(AUTOENCODERS, settings, "img_flux_ae", dtype, "cpu")

    return build


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- the naive autoencoder


class Naive:
    """The autoencoder of latent diffusion (Rombach et al. 2022) in plain functions of a frame [c, H, W]."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def conv(self, x, name, stride=1, padding=1):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x[None], weight, bias, stride, padding)[0]

    def norm(self, x, name):
        """Each of 32 groups of channels has mean 0 and variance 1; then a weight and a bias by channel."""
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return groups.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]

    def swish_norm(self, x, name):
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def resnet(self, x, name):
        inner = self.conv(self.swish_norm(x, f"{name}.norm1"), f"{name}.conv1")
        inner = self.conv(self.swish_norm(inner, f"{name}.norm2"), f"{name}.conv2")
        shortcut = f"{name}.nin_shortcut"
        return inner + (self.conv(x, shortcut, padding=0) if f"{shortcut}.weight" in self.state else x)

    def attention(self, x, name):
        inner = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(inner, f"{name}.{part}", padding=0).flatten(1).T for part in "qkv")  # [H*W, C] each
        weights = torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1)
        return x + self.conv((weights @ v).T.reshape(x.shape), f"{name}.proj_out", padding=0)

    def middle(self, x, side):
        x = self.resnet(x, f"{side}.mid.block_1")
        x = self.attention(x, f"{side}.mid.attn_1")
        return self.resnet(x, f"{side}.mid.block_2")

    def head(self, x, side):
        return self.conv(self.swish_norm(x, f"{side}.norm_out"), f"{side}.conv_out")

    def moments(self, frame):
        x = self.conv(frame.double(), "encoder.conv_in")
        for level in range(4):
            for block in range(2):
                x = self.resnet(x, f"encoder.down.{level}.block.{block}")
            if level < 3:  # one row below and one column on the right, no more
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2, padding=0)
        return self.head(self.middle(x, "encoder"), "encoder")

    def decode(self, z):
        x = self.middle(self.conv(z.double(), "decoder.conv_in"), "decoder")
        for level in (3, 2, 1, 0):
            for block in range(3):
                x = self.resnet(x, f"decoder.up.{level}.block.{block}")
            if level > 0:
                x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv")
        return self.head(x, "decoder")


def test_it_equals_the_naive_autoencoder_frame_by_frame(build, state):
    autoencoder, naive = build(), Naive(state)
    video = normal(2, 3, 3, 16, 24)
    latents = autoencoder.encode(video, lambda shape: normal(*shape, seed=1))
    assert latents.shape == (2, 16, 3, 2, 3) and autoencoder.latent_size((3, 16, 24)) == (3, 2, 3)
    mode, decoded, noise = autoencoder.encode(video), autoencoder.decode(latents), normal(2, 16, 3, 2, 3, seed=1)
    for sample in range(2):
        for frame in range(3):
            mean, log_variance = naive.moments(video[sample, :, frame]).chunk(2)
            z = mean + torch.exp(log_variance / 2) * noise[sample, :, frame]
            torch.testing.assert_close(latents[sample, :, frame].double(), SCALE * (z - SHIFT), **CLOSE)
            torch.testing.assert_close(mode[sample, :, frame].double(), SCALE * (mean - SHIFT), **CLOSE)
            pixels = naive.decode(latents[sample, :, frame] / SCALE + SHIFT)
            torch.testing.assert_close(decoded[sample, :, frame].double(), pixels, **CLOSE)


def test_micro_batches_change_memory_only(build):
    video = normal(2, 3, 3, 16, 16)
    autoencoder = build(micro_batch_pixels=4 * 16 * 16)
    seen = []
    for part in (autoencoder.vae.encoder, autoencoder.vae.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    latents = autoencoder.encode(video)
    decoded = autoencoder.decode(latents)
    assert seen == [4, 2, 4, 2]
    at_once = build(micro_batch_pixels=None)
    torch.testing.assert_close(latents, at_once.encode(video), **CLOSE)
    torch.testing.assert_close(decoded, at_once.decode(latents), **CLOSE)


def test_bf16(build):
    video = normal(1, 3, 1, 16, 16)
    one, other = build(torch.bfloat16).encode(video.bfloat16()), build().encode(video)
    assert one.dtype == torch.bfloat16
    assert (one.float() - other).norm() / other.norm() < 0.05


def test_training_drops_the_decoder(build):
    autoencoder = build()
    video = normal(1, 3, 1, 16, 16)
    latents = autoencoder.encode(video)
    autoencoder.drop_decoder()
    assert torch.equal(autoencoder.encode(video), latents)
    assert not any("decoder" in name for name, _ in autoencoder.named_parameters())
    with pytest.raises(RuntimeError, match="decode after drop_decoder"):
        autoencoder.decode(latents)


# ------------------------------------------------------------------------------------------------------- names


def source_of(tensors: dict[str, torch.Tensor]) -> WeightSource:
    return WeightSource(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items()},
        lambda names: {name: tensors[name] for name in names},
    )


def test_the_published_names_and_shapes_become_those_of_the_module():
    with torch.device("meta"):
        vae = Autoencoder2D(device="meta").vae
    published = {name: torch.empty(shape, device="meta") for name, shape in MANIFEST.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert to_diffusers(source_of(published)).shapes == expected
    assert len(expected) == 244 and sum(p.numel() for p in vae.parameters()) == 83_819_683
    assert {k: list(v) for k, v in to_original(source_of(vae.state_dict())).shapes.items()} == MANIFEST


def test_there_and_back(state, file):
    source = open_weights(Path(file))
    back = to_original(to_diffusers(source))
    assert back.shapes == source.shapes and back.dtypes == source.dtypes
    tensors = back.read(list(back.shapes))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("num_res_blocks", [1, 3])
def test_other_depths_go_there_and_back(num_res_blocks):
    with torch.device("meta"):
        state = Autoencoder2D(ch=32, num_res_blocks=num_res_blocks, device="meta").vae.state_dict()
    source = source_of(state)
    original = to_original(source, num_res_blocks)
    assert not any(word in name for name in original.shapes for word in ("resnets", "blocks", "samplers", "mid_block"))
    assert to_diffusers(original, num_res_blocks).shapes == source.shapes


def test_a_folder_of_diffusers_loads_as_it_is(build, tmp_path):
    autoencoder = build()
    autoencoder.vae.save_pretrained(tmp_path / "vae")
    video = normal(1, 3, 1, 16, 16)
    again = build(from_pretrained=str(tmp_path / "vae"))
    assert torch.equal(again.encode(video), autoencoder.encode(video))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("decoder.up.3.block.2.norm1.bias"), "1 missing (decoder.up_blocks.0.resnets.2.norm1.bias)"),
        (lambda s: s.update({"decoder.up.4.block.0.norm1.bias": torch.zeros(1)}), "1 unexpected (decoder.up.4.block.0"),
        (
            lambda s: s.update({"encoder.mid.attn_1.q.weight": torch.zeros(128, 64, 1, 1)}),
            "1 mis-shaped (encoder.mid_block.attentions.0.to_q.weight [128, 64] instead of [128, 128])",
        ),
    ],
)
def test_weights_that_do_not_fit(change, complaint, build, state, tmp_path):
    changed = dict(state)
    change(changed)
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as error:
        build(from_pretrained=str(tmp_path / "other.safetensors"))
    assert complaint in str(error.value) and "does not fit autoencoder_2d" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, complaint",
    [({"ch_mult": [1, 2]}, r"ch_mult=\[1, 2\] must be 4 numbers"), ({"ch": 40}, "ch=40 must be a multiple of 32")],
)
def test_settings_that_cannot_be_used(settings, complaint, build):
    with pytest.raises(ValueError, match=complaint):
        build(**settings)


def test_sizes_that_do_not_fit(build):
    with pytest.raises(ValueError, match="16 x 20 pixels do not fit the autoencoder: give multiples of 8"):
        build().encode(torch.zeros(1, 3, 1, 16, 20))
