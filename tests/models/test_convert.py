import json
from pathlib import Path

import pytest
import torch

from opensora.models.mmdit.convert import FLUX, OPEN_SORA, Layout, convert, layout_of, plan_conversion

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = {
    "flux": FLUX,
    "open-sora": OPEN_SORA,
    "fused, rotate-half": Layout(True, False),
    "split, interleaved": Layout(False, True),
}


def model_of(layout, small_mmdit, **changes):
    return small_mmdit(fused_qkv=layout.fused_qkv, use_liger_rope=not layout.interleaved, **changes)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
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
    layouts = {name: FLUX if name == "flux_dev_t2i" else Layout("fused" in name, False) for name in (source, target)}
    assert layout_of(shapes).fused_qkv == layouts[source].fused_qkv
    plan = plan_conversion(shapes, layouts[source], layouts[target])
    converted = {name: plan.shape(name, shapes) for name in plan.pieces if not name.startswith("guidance_in.")}
    assert converted == expected


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
