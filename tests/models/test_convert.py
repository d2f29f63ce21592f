import json
from pathlib import Path

import pytest
import torch

from opensora.models.mmdit.convert import convert, plan_conversion
from opensora.models.mmdit.infer import check_whole, infer_settings
from opensora.models.mmdit.layouts import DIFFUSERS, FLUX, LAYOUTS, OPEN_SORA, Layout, layout_of, parts_of, tensor_with

GOLDEN = Path(__file__).parents[1] / "golden"
OF_MODELS = [name for name in LAYOUTS if name != "diffusers"]


def model_of(layout, small_mmdit, **changes):
    return small_mmdit(fused_qkv=layout.naming == "flux", use_liger_rope=not layout.interleaved, **changes)


@pytest.mark.parametrize("source", OF_MODELS)
@pytest.mark.parametrize("target", OF_MODELS)
def test_converted_model_gives_the_same_output(small_mmdit, small_inputs, source, target):
    source, target = LAYOUTS[source], LAYOUTS[target]
    model = model_of(source, small_mmdit, guidance_embed=True, cond_embed=True)
    other = model_of(target, small_mmdit, guidance_embed=True, cond_embed=True)
    converted = convert(model.state_dict(), source, target)
    other.load_state_dict(converted)
    inputs = small_inputs(model)
    output = model(**inputs)
    reference_error = json.loads((GOLDEN / "mmdit_conversion.json").read_text())["conversion_max_abs_err"]
    tolerance = max(reference_error, 1e-6) * max(1.0, output.abs().max().item())
    assert (other(**inputs) - output).abs().max() < tolerance

    back = convert(converted, target, source)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_permutation_is_the_documented_one(small_mmdit):
    """Rows 2d and 2d+1 of a head become rows d and D/2+d."""
    state = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    converted = convert(state, FLUX, OPEN_SORA)
    k = state["double_blocks.1.txt_attn.qkv.weight"][32:64]  # heads of 16 rows
    scale = state["single_blocks.0.norm.query_norm.scale"]
    for d in range(8):
        for head in (0, 16):
            assert torch.equal(converted["double_blocks.1.txt_attn.k_proj.weight"][head + d], k[head + 2 * d])
            assert torch.equal(converted["double_blocks.1.txt_attn.k_proj.weight"][head + 8 + d], k[head + 2 * d + 1])
        assert converted["single_blocks.0.norm.query_norm.scale"][d] == scale[2 * d]
        assert converted["single_blocks.0.norm.query_norm.scale"][8 + d] == scale[2 * d + 1]
    assert torch.equal(converted["single_blocks.2.v_mlp.bias"], state["single_blocks.2.linear1.bias"][64:])


@pytest.mark.parametrize(
    "source, target", [("flux_dev_t2i", "mmdit_stage1"), ("mmdit_stage1", "mmdit_stage1_fused_qkv")]
)
def test_plan_for_the_real_models_equals_their_manifests(source, target):
    shapes, expected = (
        {
            name: tuple(shape)
            for name, (shape, _) in json.loads((GOLDEN / "manifests" / f"{n}.json").read_text()).items()
        }
        for n in (source, target)
    )
    layouts = {
        "flux_dev_t2i": FLUX,
        "mmdit_stage1": OPEN_SORA,
        "mmdit_stage1_fused_qkv": LAYOUTS["flux-rotate-half"],
    }
    assert layout_of(shapes).naming == layouts[source].naming
    plan = plan_conversion(shapes, layouts[source], layouts[target])
    converted = {name: plan.shape(name, shapes) for name in plan.pieces if not name.startswith("guidance_in.")}
    assert converted == expected


def manifest(name):
    entries = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    return {name: tuple(shape) for name, (shape, _) in entries.items()}


@pytest.mark.parametrize("name, layout", [("flux_dev_t2i", FLUX), ("flux_dev_diffusers", DIFFUSERS)])
def test_names_of_flux_dev_are_those_of_diffusers(name, layout):
    """The manifest is the state dict of diffusers' FluxTransformer2DModel with its defaults and guidance_embeds."""
    shapes, target = manifest(name), FLUX if layout is DIFFUSERS else DIFFUSERS
    assert layout_of(shapes) == layout
    expected = manifest("flux_dev_diffusers" if target is DIFFUSERS else "flux_dev_t2i")
    assert plan_conversion(shapes, layout, target).shapes(shapes) == expected


@pytest.mark.parametrize("layout", [OPEN_SORA, FLUX])
@pytest.mark.parametrize("guidance_embed", [False, True])
def test_diffusers_model_gives_the_same_output(small_mmdit, small_inputs, layout, guidance_embed):
    """And the other way round: what was converted to diffusers' layout comes back bit for bit."""
    diffusers = pytest.importorskip("diffusers")
    model = model_of(layout, small_mmdit, guidance_embed=guidance_embed, mlp_ratio=4.0)
    other = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embed,
        axes_dims_rope=(4, 6, 6),
    )
    converted = convert(model.state_dict(), layout, DIFFUSERS)
    other.load_state_dict(converted, strict=True)
    inputs = small_inputs(model)
    with torch.no_grad():
        found = other(
            hidden_states=inputs["img"],
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["y_vec"],
            timestep=inputs["timesteps"],
            img_ids=inputs["img_ids"][0],
            txt_ids=inputs["txt_ids"][0],
            guidance=inputs["guidance"],
        ).sample
        expected = model(**inputs)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    back = convert(other.state_dict(), DIFFUSERS, layout)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_change_is_not_copied(small_mmdit):
    """From flux to Open-Sora only q and k are: a file is read once, and no second one fits into memory."""
    state = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    copied = {
        name
        for name, tensor in convert(state, FLUX, OPEN_SORA).items()
        if tensor.untyped_storage().data_ptr() not in storages
    }
    assert copied and all("q_proj" in name or "k_proj" in name or name.endswith("scale") for name in copied)


@pytest.mark.parametrize("naming", ["open-sora", "flux", "diffusers"])
def test_parts_and_tensors_are_inverse(naming):
    layout = Layout(naming, False)
    shapes = plan_conversion(manifest("flux_dev_t2i"), Layout("flux", False), layout).shapes(manifest("flux_dev_t2i"))
    for name in shapes:
        parts = parts_of(name, naming)
        assert {tensor_with(part, naming) for part in parts} == {name}


def test_names_that_no_layout_has_stay_as_they_are():
    odd = {"a{b}.{}": (2,), "double_blocks.x.qkv": (1,), "step": (), "blocks.7.{0.__class__}": (3,)}
    for target in LAYOUTS.values():
        assert plan_conversion(odd, FLUX, target).shapes(odd) == odd


def test_settings_are_told_by_shapes(small_mmdit):
    settings = {"cond_embed": True, "guidance_embed": True, "qkv_bias": False, "mlp_ratio": 3.5}
    shapes = {name: tuple(tensor.shape) for name, tensor in small_mmdit(**settings).state_dict().items()}
    sizes = {"in_channels": 16, "vec_in_dim": 10, "context_in_dim": 12, "hidden_size": 32, "num_heads": 2}
    counts = {"depth": 2, "depth_single_blocks": 3, "patch_size": 2}
    assert infer_settings(shapes) == check_whole(shapes, "x") == settings | sizes | counts
    del shapes["double_blocks.0.img_attn.k_proj.weight"]
    shapes["img_in.bias"] = (31,)
    with pytest.raises(ValueError, match=r"x does not hold a whole .* 1 missing \(double_.*1 mis-shaped \(img_in.bias"):
        check_whole(shapes | {"step": ()}, "x")
    with pytest.raises(ValueError, match=r"nothing tells in_channels, hidden_size"):
        check_whole({"double_blocks.0.a": (3,)}, "x")


def test_without_qkv_bias(small_mmdit):
    state = small_mmdit(qkv_bias=False, fused_qkv=True, use_liger_rope=False).state_dict()
    expected = small_mmdit(qkv_bias=False).state_dict()
    assert convert(state, FLUX, OPEN_SORA).keys() == expected.keys()


def test_order_of_the_names_does_not_matter(small_mmdit):
    """safetensors files are sorted by name: k before q."""
    state = small_mmdit().state_dict()
    expected = convert(state, OPEN_SORA, FLUX)
    found = convert(dict(sorted(state.items())), OPEN_SORA, FLUX)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_layout_is_unknown_without_blocks():
    assert layout_of(["img_in.weight", "final_layer.linear.bias"]) is None
