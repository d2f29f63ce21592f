"""Adapters merged into weights, against peft's own forward and merge."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from opensora.models.lora import Adapters, adapter_files, check_resumable, check_targets, find_adapters, plain_name
from opensora.models.weight_files import open_weights, save_shard


def save_adapters(model, folder):
    folder.mkdir(parents=True)
    for name, content in adapter_files(model).items():
        (folder / name).write_bytes(content)


@pytest.fixture
def adapted(small_mmdit, tmp_path):
    """adapted(**LoraConfig's arguments) -> (a model under peft with random adapters, its folder, the base's file)."""

    def make(targets=("q_proj", "k_proj", "v_mlp", "proj", "linear2"), dtype=torch.float32, **arguments):
        model = small_mmdit().to(dtype)
        base = tmp_path / "base.safetensors"
        save_shard(base, model.state_dict())
        config = LoraConfig(target_modules=list(targets), **arguments)
        wrapped = get_peft_model(model, config).to(dtype)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        save_adapters(wrapped, tmp_path / "lora")
        return wrapped, tmp_path, base

    return make


@pytest.mark.parametrize("arguments", [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2, "use_rslora": True}])
def test_merged_weights_compute_what_the_adapted_model_computes(adapted, small_mmdit, small_inputs, arguments):
    wrapped, folder, base = adapted(**arguments)
    merged = Adapters.read(folder).merged(open_weights(base), "here")
    model = small_mmdit()
    inputs = small_inputs(model)
    before = model(**inputs)
    model.load_state_dict(merged.read(list(merged.shapes)))
    torch.testing.assert_close(model(**inputs), wrapped(**inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**inputs), before, atol=1e-2)


def test_merged_weights_equal_pefts_merge(adapted):
    wrapped, folder, base = adapted(r=4, lora_alpha=8)
    merged = Adapters.read(folder).merged(open_weights(base), "here")
    expected = wrapped.merge_and_unload().state_dict()
    torch.testing.assert_close(merged.read(list(expected)), dict(expected), atol=1e-6, rtol=1e-6)


def test_saved_adapters_are_pefts_own_format(adapted, small_mmdit, small_inputs):
    wrapped, folder, _ = adapted(r=4)
    again = PeftModel.from_pretrained(small_mmdit(), folder / "lora")
    inputs = small_inputs(small_mmdit())
    assert torch.equal(again(**inputs), wrapped(**inputs))


def test_new_adapters_change_no_bit(adapted, tmp_path):
    wrapped, _, base = adapted(r=4, dtype=torch.bfloat16)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    save_adapters(wrapped, tmp_path / "new" / "lora")
    merged = Adapters.read(tmp_path / "new").merged(open_weights(base), "here")
    tensors, expected = merged.read(list(merged.shapes)), load_file(base)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_strength_scales_what_is_added(adapted):
    _, folder, base = adapted(r=4)
    name = "single_blocks.1.linear2.weight"
    weight = open_weights(base).read([name])[name]
    whole, half = (
        Adapters.read(folder, strength=strength).merged(open_weights(base), "here").read([name])[name]
        for strength in (1.0, 0.5)
    )
    torch.testing.assert_close(half - weight, (whole - weight) / 2, atol=1e-6, rtol=1e-5)


def test_plain_names(adapted):
    wrapped, *_ = adapted(r=2, targets=["q_proj"])
    names = {plain_name(name) for name, _ in wrapped.named_parameters()}
    assert {"single_blocks.0.q_proj.weight", "single_blocks.0.q_proj.lora_A.weight", "img_in.bias"} <= names


def test_what_has_no_adapters(tmp_path):
    assert find_adapters(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="has no adapters"):
        Adapters.read(tmp_path)


def change_config(folder, **changes):
    path = folder / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"modules_to_save": ["cond_in"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_other_kinds_of_adapters_are_refused(adapted, changes):
    _, folder, _ = adapted(r=2)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*only plain LoRA"):
        Adapters.read(folder)


def test_broken_adapters(adapted):
    _, folder, _ = adapted(r=2)
    file = folder / "lora" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Adapters.read(folder)
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "single_blocks.0.q_proj.lora_B" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks 'single_blocks.0.q_proj.lora_B.weight'"):
        Adapters.read(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        Adapters.read(folder)


def test_adapters_of_another_model(adapted, small_mmdit, tmp_path):
    _, folder, _ = adapted(r=2)
    save_shard(tmp_path / "other.safetensors", small_mmdit(depth=1, depth_single_blocks=1).state_dict())
    with pytest.raises(ValueError, match=r"here adapts \S+ \[32, 32\], in the weights there is none"):
        Adapters.read(folder).merged(open_weights(tmp_path / "other.safetensors"), "here")


def test_targets_are_layers_of_the_model(small_settings):
    check_targets(["q_proj", "img_mlp.0", "final_layer.linear"], small_settings())
    with pytest.raises(ValueError, match=r"ends in 'qkv': take of .*img_attn\.q_proj"):
        check_targets(["q_proj", "qkv"], small_settings())


def test_only_what_the_config_trains_is_resumed(adapted, tmp_path):
    _, folder, _ = adapted(r=4, lora_alpha=8)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": None}
    check_resumable(folder, lora)
    with pytest.raises(ValueError, match="holds adapters: give the lora_config"):
        check_resumable(folder, None)
    with pytest.raises(ValueError, match=r"lora_config\.r=2, but .* with 4"):
        check_resumable(folder, {**lora, "r": 2})
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\], but"):
        check_resumable(folder, {**lora, "target_modules": ["q_proj"]})
    (tmp_path / "whole").mkdir()
    with pytest.raises(ValueError, match="holds whole weights"):
        check_resumable(tmp_path / "whole", lora)
