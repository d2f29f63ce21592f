import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.mmdit import MMDiT
from opensora.models.mmdit.initialise import init_weights
from opensora.models.mmdit.layers import timestep_embedding
from opensora.models.mmdit.rotary import rotary_table, rotate_half, rotate_interleaved
from opensora.registry import MODELS

GOLDEN = Path(__file__).parents[1] / "golden"

ELEVEN_BILLION = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "qkv_bias": True,
}
OPEN_SORA = {"guidance_embed": False, "fused_qkv": False, "use_liger_rope": True}
MANIFESTS = {
    "mmdit_stage1": (OPEN_SORA, 11_891_178_560),
    "mmdit_stage1_i2v": ({**OPEN_SORA, "cond_embed": True}, 11_891_390_528),
    "mmdit_infer_256px": ({**OPEN_SORA, "cond_embed": True}, 11_891_390_528),
    "mmdit_stage1_fused_qkv": ({**OPEN_SORA, "fused_qkv": True}, 11_891_178_560),
    "mmdit_infer_256px_fused_qkv": ({**OPEN_SORA, "fused_qkv": True, "cond_embed": True}, 11_891_390_528),
    "flux_dev_t2i": ({"guidance_embed": True}, 11_901_408_320),  # the defaults are flux's
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_parameters_equal_the_manifest_in_name_shape_and_order(name):
    settings, count = MANIFESTS[name]
    with torch.device("meta"):
        model = MODELS.build({"type": "flux", **ELEVEN_BILLION, **settings})
    manifest = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    found = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    assert found == [(name, shape) for name, (shape, _) in manifest.items()]
    assert list(model.state_dict()) == list(manifest)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())


@pytest.fixture(scope="module")
def golden():
    """(numbers, tensors) of the reference's small model."""
    numbers = json.loads((GOLDEN / "mmdit_small.json").read_text())
    return numbers, load_file(GOLDEN / "mmdit_small.safetensors")


def golden_model(golden):
    numbers, tensors = golden
    model = MMDiT(**{key: value for key, value in numbers["config"].items() if key != "grad_ckpt_settings"})
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")})
    return model


def golden_inputs(golden):
    return {name[6:]: tensor for name, tensor in golden[1].items() if name.startswith("input.")}


def test_output_loss_and_gradients_equal_the_reference(golden):
    numbers, tensors = golden
    model = golden_model(golden)
    output = model(**golden_inputs(golden))
    torch.testing.assert_close(output, tensors["output"], atol=1e-5, rtol=1e-5)

    loss = (output - tensors["target"]).square().mean()
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-6)

    loss.backward()
    expected = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("grad.")}
    assert len(expected) > 15
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name in expected:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], atol=3e-5 * scale, rtol=0)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    assert norm == pytest.approx(numbers["grad_global_norm"], rel=1e-6)


def test_bf16_stays_close_to_fp32(golden):
    model = golden_model(golden).bfloat16()
    ids = ("img_ids", "txt_ids")
    inputs = {k: v if k in ids else v.bfloat16() for k, v in golden_inputs(golden).items()}
    output = model(**inputs)
    assert output.dtype == torch.bfloat16
    error = (output.float() - golden[1]["output"]).norm() / golden[1]["output"].norm()
    assert error < 0.02
    # an fp32 timestep is taken too: nothing else is left in fp32
    assert model(**{**inputs, "timesteps": inputs["timesteps"].float()}).dtype == torch.bfloat16


def test_a_sample_does_not_depend_on_its_batch(small_mmdit, small_inputs):
    model = small_mmdit(cond_embed=True, guidance_embed=True)
    inputs = small_inputs(model, batch=3)
    whole = model(**inputs)
    alone = model(**{name: value[1:2] for name, value in inputs.items()})
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)


def test_text_tokens_have_no_order(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    output = model(**inputs)
    torch.testing.assert_close(model(**{**inputs, "txt": inputs["txt"].flip(1)}), output, atol=1e-5, rtol=1e-4)
    assert (model(**{**inputs, "img_ids": inputs["img_ids"].flip(1)}) - output).abs().max() > 1e-2


def test_positions_are_relative(small_mmdit, small_inputs):
    """Rotary attention sees differences of positions only."""
    model = small_mmdit()
    inputs = small_inputs(model)
    shift = torch.tensor([5.0, 2.0, 9.0])
    moved = {**inputs, "img_ids": inputs["img_ids"] + shift, "txt_ids": inputs["txt_ids"] + shift}
    torch.testing.assert_close(model(**moved), model(**inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, setting", [("cond", "cond_embed"), ("guidance", "guidance_embed")])
def test_a_missing_condition_is_an_error(small_mmdit, small_inputs, name, setting):
    model = small_mmdit(**{setting: True})
    with pytest.raises(ValueError, match=rf"model\.{setting}=True .* without `{name}`"):
        model(**small_inputs(model, **{name: None}))


def test_conditions_that_the_model_does_not_take_change_nothing(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    more = {**inputs, "cond": torch.randn(2, 12, 20), "guidance": torch.ones(2)}
    assert torch.equal(model(**inputs), model(**more))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, r"model.hidden_size=32 is not divisible by model.num_heads=5"),
        ({"axes_dim": [4, 6, 8]}, r"model.axes_dim=\[4, 6, 8\] must be even numbers .* = 16"),
        ({"axes_dim": [5, 5, 6]}, r"model.axes_dim=\[5, 5, 6\] must be even"),
    ],
)
def test_head_dimensions_are_checked(small_settings, changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(small_settings(**changes))


def test_blocks_use_the_attention_they_hold(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    expected, shapes = model(**inputs), []
    for block in [*model.double_blocks, *model.single_blocks]:

        def recorded(q, k, v, attend=block.attention):
            shapes.append((q.shape, k.shape, v.shape))
            return attend(q, k, v)

        block.attention = recorded
    assert torch.equal(model(**inputs), expected)
    assert shapes == [((2, 2, 17, 16),) * 3] * 5


def test_compiles_in_one_graph(small_mmdit, small_inputs):
    model = small_mmdit(cond_embed=True, depth=1, depth_single_blocks=1)
    inputs = small_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), model(**inputs), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ embeddings


def test_timestep_embedding_by_formula():
    t = torch.tensor([0.0, 0.25, 1.0])
    angles = [[1000 * float(x) * math.exp(-math.log(10_000) * i / 128) for i in range(128)] for x in t]
    expected = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles])
    torch.testing.assert_close(timestep_embedding(t), expected, atol=1e-4, rtol=0)


def test_timestep_is_scaled_in_its_own_dtype():
    t = torch.tensor([0.7], dtype=torch.bfloat16)
    embedding = timestep_embedding(t)
    assert embedding.dtype == torch.bfloat16
    scaled = torch.tensor([0.69921875 * 1000]).bfloat16().float()  # 0.7 and 699.2 both rounded to bf16
    assert scaled.item() == 700.0
    torch.testing.assert_close(embedding, timestep_embedding(scaled / 1000).bfloat16(), atol=2e-2, rtol=0)
    assert (embedding[0, 0].float() - math.cos(700.0)).abs() < 4e-3


def rotation_by_hand(x, ids, axes_dim, planes):
    """x [L, D] turned plane by plane; planes(d) -> the two entries of plane d."""
    turned = x.clone().double()
    of_plane = [(axis, i, dim) for axis, dim in enumerate(axes_dim) for i in range(dim // 2)]
    for d, (axis, i, dim) in enumerate(of_plane):
        first, second = planes(d)
        for row, position in enumerate(ids):
            angle = float(position[axis]) * 10_000 ** (-2 * i / dim)
            a, b = x[row, first].item(), x[row, second].item()
            turned[row, first] = a * math.cos(angle) - b * math.sin(angle)
            turned[row, second] = b * math.cos(angle) + a * math.sin(angle)
    return turned


@pytest.mark.parametrize(
    "rotate, dtype, planes",
    [
        (rotate_half, torch.float32, lambda d: (d, 8 + d)),
        (rotate_interleaved, torch.float64, lambda d: (2 * d, 2 * d + 1)),
    ],
)
def test_rotary_by_formula(rotate, dtype, planes):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, 0, 0], [1, 2, 3], [32, 47, 11], [7, 0, 90]]).float()
    x = torch.randn(2, 4, 3, 16, generator=generator)  # [B, L, H, D]
    table = rotary_table(ids.expand(2, -1, -1), [4, 6, 6], 10_000, dtype)
    assert table.cos.dtype == table.sin.dtype == torch.float32
    turned = rotate(x, table)
    for b in range(2):
        for h in range(3):
            expected = rotation_by_hand(x[b, :, h], ids, [4, 6, 6], planes)
            torch.testing.assert_close(turned[b, :, h].double(), expected, atol=1e-5, rtol=0)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- initial weights


def initialised(settings, seed=0, dtype=torch.float32):
    with torch.device("meta"):
        model = MODELS.build(settings).to(dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # whatever memory held
    torch.manual_seed(seed)
    init_weights(model)
    return model


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_initial_model_predicts_zero_and_every_weight_is_set(small_settings, small_inputs, fused_qkv):
    model = initialised(small_settings(cond_embed=True, guidance_embed=True, fused_qkv=fused_qkv))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    output = model(**small_inputs(model))
    assert torch.equal(output, torch.zeros_like(output))
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    zero_weights = {name for name in zero if name.endswith("weight")}
    assert all(
        "mod.lin" in n or "modulation" in n.lower() or n.startswith(("final_layer", "cond_in")) for n in zero_weights
    )
    assert {"cond_in.weight", "final_layer.linear.weight", "double_blocks.0.txt_mod.lin.weight"} <= zero_weights


def test_initial_weights_depend_on_the_seed_alone(small_settings):
    settings = small_settings()
    a, b, other = (initialised(settings, seed) for seed in (0, 0, 1))
    half = initialised(settings, 0, torch.bfloat16)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), half.parameters(), strict=True):
        assert torch.equal(x, y) and torch.equal(x.bfloat16(), z), name
    assert not torch.equal(a.img_in.weight, other.img_in.weight)


def test_initial_model_learns_from_its_first_updates(small_settings, small_inputs):
    model = initialised(small_settings(cond_embed=True))
    inputs = small_inputs(model, batch=8)
    target = inputs["txt"].mean() + inputs["img"].roll(1, dims=1)  # needs attention: the neighbour's token
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (model(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
