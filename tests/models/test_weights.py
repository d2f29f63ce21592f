import json
import logging
import os
import stat

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from opensora.common import get_logger
from opensora.models.mmdit.convert import convert
from opensora.models.mmdit.layouts import DIFFUSERS, FLUX, LAYOUTS, OPEN_SORA
from opensora.models.weight_files import INDEX_NAME, format_index, open_weights, plan_shards, save_shard
from opensora.models.weights import build_model


@pytest.fixture
def said(caplog, monkeypatch):
    """The logger's lines."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, logger="opensora")
    return caplog


@pytest.fixture
def state(small_mmdit):
    """The state dict of a model with the settings of `small_settings()`."""
    return {name: tensor.clone() for name, tensor in small_mmdit().state_dict().items()}


def write_checkpoint(folder, state, ema=None, max_bytes=20_000):
    """A checkpoint folder as the trainer writes it."""
    model = folder / "model"
    model.mkdir(parents=True)
    shards = plan_shards(state, max_bytes)
    for name, keys in shards:
        save_shard(model / name, {key: state[key] for key in keys})
    (model / INDEX_NAME).write_text(format_index(state, shards))
    if ema:
        dcp.save(dict(ema), storage_writer=dcp.FileSystemWriter(folder / "ema"), no_dist=True)
    (folder / "running_states.json").write_text("{}")
    return folder


def assert_holds(model, state, dtype=torch.float32):
    found = model.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------- sources


def as_safetensors(tmp_path, state):
    save_file(state, tmp_path / "Open_Sora_v2.safetensors")
    return tmp_path / "Open_Sora_v2.safetensors"


def as_torch_file(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def as_checkpoint(tmp_path, state):
    return write_checkpoint(tmp_path / "epoch0-global_step10", state)


def as_run_folder(tmp_path, state):
    write_checkpoint(tmp_path / "epoch0-global_step9", {name: 0 * tensor for name, tensor in state.items()})
    return as_checkpoint(tmp_path, state).parent


def as_list_of_checkpoints(tmp_path, state):
    folder = as_run_folder(tmp_path, state)
    return [str(folder / "epoch0-global_step9"), str(folder / "epoch0-global_step10")]


def as_sharded_folder(tmp_path, state):
    """As transformers and diffusers write it."""
    names = sorted(state)
    weight_map = {name: f"diffusion-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, tmp_path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "diffusion.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def as_index_of_a_folder(tmp_path, state):
    return as_sharded_folder(tmp_path, state) / "diffusion.safetensors.index.json"


def as_folder_of_torch_shards(tmp_path, state):
    """As transformers wrote it before safetensors."""
    names = list(state)
    torch.save({name: state[name] for name in names[::2]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[1::2]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def as_folder_of_both(tmp_path, state):
    """Safetensors are taken where there are torch's shards too."""
    as_folder_of_torch_shards(tmp_path, {name: 0 * tensor for name, tensor in state.items()})
    return as_sharded_folder(tmp_path, state)


def as_diffusers_pipeline(tmp_path, state):
    """FLUX.1-dev's repository: other files of weights lie beside the folder that is meant."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        save_file({"other": torch.zeros(1)}, tmp_path / name)
    return as_sharded_folder(tmp_path / "transformer", state).parent


def as_upstream_checkpoint(tmp_path, state):
    """As ColossalAI's plugins write it: total_size in MB, no config.txt of its own, other files beside `model/`."""
    path = write_checkpoint(tmp_path / "epoch1-global_step20", state)
    for file in ("lr_scheduler", "sampler", "ema.pt", "master.safetensors"):
        (path / file).write_bytes(b"")
    (path / "optimizer").mkdir()
    (path / "optimizer" / "pytorch_optim.bin.index.json").write_text("{}")
    return path


def as_old_torch_file(tmp_path, state):
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "model.pth"


def as_folder_with_one_file(tmp_path, state):
    return as_safetensors(tmp_path, state).parent


SOURCES = [
    as_safetensors,
    as_torch_file,
    as_checkpoint,
    as_run_folder,
    as_list_of_checkpoints,
    as_sharded_folder,
    as_folder_with_one_file,
    as_index_of_a_folder,
    as_folder_of_torch_shards,
    as_folder_of_both,
    as_diffusers_pipeline,
    as_upstream_checkpoint,
    as_old_torch_file,
]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_loads_the_same_bits(tmp_path, small_settings, state, write):
    path = write(tmp_path, state)
    path = path if isinstance(path, list) else str(path)
    settings = small_settings(from_pretrained=path, strict_load=False, grad_ckpt_settings=(8, 100))
    assert_holds(build_model(settings, torch.float32, "cpu"), state)


def test_weights_take_the_dtype_asked_for(tmp_path, small_settings, state):
    path = as_safetensors(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()})
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    settings = small_settings(from_pretrained=str(path))
    assert_holds(build_model(settings, torch.bfloat16, "cpu"), rounded, torch.bfloat16)
    assert_holds(build_model(settings, torch.float32, torch.device("cpu")), rounded, torch.float32)


def test_loaded_weights_are_not_tied_to_the_file(tmp_path, small_settings, state):
    path = as_safetensors(tmp_path, state)
    model = build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_holds(model, state)


def test_from_scratch_depends_on_the_seed(small_settings):
    def build(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return build_model(small_settings(from_pretrained=None), dtype, "cpu").state_dict()

    first, again, other, half = build(3), build(3), build(4), build(3, torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].bfloat16(), half[name]) for name in first)
    assert not torch.equal(first["img_in.weight"], other["img_in.weight"])


# ---------------------------------------------------------------------------------------- what fits and what not


def load(tmp_path, state, settings):
    path = as_safetensors(tmp_path, state)
    return build_model({**settings, "from_pretrained": str(path)}, torch.float32, "cpu")


def test_condition_embedder_may_be_missing(tmp_path, small_settings, state, said):
    model = load(tmp_path, state, small_settings(cond_embed=True))
    assert not model.cond_in.weight.any() and not model.cond_in.bias.any()
    assert torch.equal(model.img_in.weight, state["img_in.weight"])
    assert any("has no cond_in.weight, cond_in.bias: set to zero" in line for line in said.messages)


def test_embedders_may_be_left_over(tmp_path, small_settings, small_mmdit, said):
    full = small_mmdit(cond_embed=True, guidance_embed=True).state_dict()
    model = load(tmp_path, full, small_settings())
    assert_holds(model, {n: t for n, t in full.items() if not n.startswith(("cond_in", "guidance_in"))})
    assert any("cond_in.weight" in line and "not in the model, left out" in line for line in said.messages)


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize("strict_load", [False, True])
def test_misfits_are_one_error_that_lists_them(tmp_path, small_settings, state, strict_load):
    wrong = without(state, "txt_in.bias") | {"img_in.weight": torch.zeros(32, 20), "step": torch.tensor(1)}
    with pytest.raises(ValueError) as error:
        load(tmp_path, wrong, small_settings(strict_load=strict_load))
    message = str(error.value)
    assert "1 missing (txt_in.bias), 1 unexpected (step)" in message
    assert "1 mis-shaped (img_in.weight [32, 20] instead of [32, 16])" in message
    assert "Open_Sora_v2.safetensors" in message and "\n" not in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"guidance_embed": True}, r"4 missing \(guidance_in.in_layer.weight, "),
        ({"depth": 3}, r"32 missing \(double_blocks.2.img_mod.lin.weight, .*, \.\.\.\)"),
        ({"depth_single_blocks": 1}, r"24 unexpected \(single_blocks.1.k_proj.bias"),
        ({"hidden_size": 64, "num_heads": 4}, r"\d+ mis-shaped \(img_in.weight \[32, 16\] instead of \[64, 16\]"),
    ],
)
def test_wrong_model_settings(tmp_path, small_settings, state, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, state, small_settings(**changes))


def test_unknown_model_setting(small_settings):
    with pytest.raises(ValueError, match=r"model.depht is not a setting of model 'flux'.*did you mean 'depth'"):
        build_model(small_settings(depht=2), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"img_flux.in_channels is required"):
        build_model({"type": "flux"}, torch.float32, "cpu", where="img_flux")


def test_error_names_the_settings_to_change(tmp_path, small_settings, small_mmdit, state):
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    for weights in (state, flux):
        with pytest.raises(ValueError, match=r"^img_flux.from_pretrained: .*with depth=2, depth_single_blocks=3$"):
            path = as_safetensors(tmp_path, weights)
            settings = small_settings(depth=3, depth_single_blocks=1, from_pretrained=str(path))
            build_model(settings, torch.float32, "cpu", where="img_flux")


def test_what_was_loaded_is_said(tmp_path, small_settings, state, said):
    mixed = {name: tensor.half() if "norm" in name else tensor for name, tensor in state.items()}
    path = as_safetensors(tmp_path, mixed)
    build_model(small_settings(from_pretrained=str(path)), torch.bfloat16, "cpu")
    half = sum("norm" in name for name in mixed)
    size = sum(tensor.nbytes for tensor in mixed.values()) / 2**10
    assert f"{path}: {half} tensors in float16 are cast to bfloat16" in said.messages
    assert f"{path}: {len(mixed) - half} tensors in float32 are cast to bfloat16" in said.messages
    summary = f"loaded {len(mixed)} tensors, 108,176 parameters, {size:.1f} KiB from {path} in "
    assert said.messages[-1].startswith(summary) and len(said.messages) == 3


def test_long_loads_say_how_far_they_are(tmp_path, small_settings, state, said, monkeypatch):
    monkeypatch.setattr("opensora.models.byte_progress.SECONDS_BETWEEN_LINES", 0)
    load(tmp_path, state, small_settings())
    lines = [line for line in said.messages if line.startswith("loading ")]
    assert len(lines) == len(state)
    assert "KiB of 422.6 KiB" in lines[0] and lines[-1].endswith("422.6 KiB of 422.6 KiB, 0 s left")


# --------------------------------------------------------------------------------------------------- layouts


def test_flux_file_is_converted(tmp_path, small_settings, small_mmdit, small_inputs, said):
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False, guidance_embed=True)
    model = load(tmp_path, flux.state_dict(), small_settings(guidance_embed=True))
    assert list(model.state_dict()) == list(small_mmdit(guidance_embed=True).state_dict())
    inputs = small_inputs(flux)
    torch.testing.assert_close(model(**inputs), flux(**inputs), atol=1e-5, rtol=1e-5)
    assert any("converting fused qkv with interleaved rotary to split qkv" in line for line in said.messages)


def test_converted_weights_can_be_written_and_loaded(tmp_path, small_settings, small_mmdit):
    """What is split of one tensor shares its memory: the files must not."""
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    converted = convert(flux, FLUX, OPEN_SORA)
    path = write_checkpoint(tmp_path / "epoch0-global_step10", converted, max_bytes=10**9)
    written = build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")
    assert_holds(load(tmp_path, flux, small_settings()), written.state_dict())
    assert sum(f.stat().st_size for f in path.glob("model/*.safetensors")) < 1.2 * sum(t.nbytes for t in flux.values())


def test_open_sora_file_into_flux_layout(tmp_path, small_settings, small_mmdit, state, said):
    model = load(tmp_path, state, small_settings(fused_qkv=True, use_liger_rope=False))
    expected = convert(state, OPEN_SORA, FLUX)
    assert_holds(model, {name: expected[name] for name in model.state_dict()})
    assert any("converting split qkv with rotate-half rotary" in line for line in said.messages)


def test_same_layout_is_not_converted(tmp_path, small_settings, small_mmdit, said):
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    assert_holds(load(tmp_path, flux, small_settings(fused_qkv=True, use_liger_rope=False)), flux)
    assert not any("converting" in line or "taken as" in line for line in said.messages)


def test_same_names_with_another_rotary_are_taken_as_they_are(tmp_path, small_settings, small_mmdit, said):
    own = small_mmdit(fused_qkv=True, use_liger_rope=True).state_dict()
    assert_holds(load(tmp_path, own, small_settings(fused_qkv=True, use_liger_rope=True)), own)
    assert any("taken as rotate-half, as the model's use_liger_rope says" in line for line in said.messages)


def test_diffusers_file_is_converted(tmp_path, small_settings, small_mmdit, said):
    model = small_mmdit(guidance_embed=True)
    diffusers = convert(model.state_dict(), OPEN_SORA, DIFFUSERS)
    for settings in (small_settings(guidance_embed=True), small_settings(fused_qkv=True, use_liger_rope=False)):
        expected = convert(diffusers, DIFFUSERS, FLUX if settings["fused_qkv"] else OPEN_SORA)
        loaded = load(tmp_path, diffusers, settings)
        assert_holds(loaded, {name: expected[name] for name in loaded.state_dict()})
    assert any("converting diffusers' names with interleaved rotary to split qkv" in line for line in said.messages)
    assert any("guidance_in.in_layer.weight" in line and "left out" in line for line in said.messages)


def test_marked_file_is_converted_though_its_names_fit(tmp_path, small_settings, small_mmdit):
    """Names don't tell the rotary form; our own files do."""
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    expected = convert(flux, FLUX, LAYOUTS["flux-rotate-half"])
    save_file(flux, tmp_path / "marked.safetensors", metadata={"format": "pt", "layout": "flux"})
    settings = small_settings(fused_qkv=True, from_pretrained=str(tmp_path / "marked.safetensors"))
    assert_holds(build_model(settings, torch.float32, "cpu"), expected)


@pytest.mark.parametrize("beside", ["checkpoint", "run folder"])
def test_checkpoint_has_the_layout_of_its_run(tmp_path, small_settings, small_mmdit, beside):
    state = small_mmdit(fused_qkv=False, use_liger_rope=False).state_dict()
    path = write_checkpoint(tmp_path / "epoch0-global_step10", state)
    model = {"fused_qkv": False, "use_liger_rope": False}
    ((path if beside == "checkpoint" else tmp_path) / "config.txt").write_text(json.dumps({"model": model}))
    expected = convert(state, LAYOUTS["open-sora-interleaved"], OPEN_SORA)
    assert_holds(build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu"), expected)


def test_misfits_of_a_converted_file_are_errors_too(tmp_path, small_settings, small_mmdit):
    flux = small_mmdit(fused_qkv=True, use_liger_rope=False).state_dict()
    name = "single_blocks.0.linear1.weight"
    with pytest.raises(ValueError, match=r"mis-shaped \(single_blocks.0.v_mlp.weight \[92, 32\] instead of \[96, 32\]"):
        load(tmp_path, {**flux, name: flux[name][:-4].clone()}, small_settings())
    with pytest.raises(ValueError, match=r"missing .*unexpected"):
        load(tmp_path, without(flux, name), small_settings())


# -------------------------------------------------------------------------------------------- averaged weights


def test_averaged_weights(tmp_path, small_settings, state):
    ema = {name: tensor + 1 for name, tensor in state.items()}
    path = write_checkpoint(tmp_path / "epoch0-global_step10", state, ema)
    settings = small_settings(from_pretrained=str(path))
    assert_holds(build_model(settings, torch.float32, "cpu"), state)
    assert_holds(build_model(settings, torch.float32, "cpu", use_ema=True), ema)
    assert_holds(build_model(settings, torch.bfloat16, "cpu", use_ema=True), ema, torch.bfloat16)


def test_averaged_weights_are_converted_and_checked(tmp_path, small_settings, small_mmdit, small_inputs, state):
    path = write_checkpoint(tmp_path / "epoch0-global_step10", state, without(state, "txt_in.bias"))
    with pytest.raises(ValueError, match=r"1 missing \(txt_in.bias\)"):
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu", use_ema=True)
    path = write_checkpoint(tmp_path / "epoch0-global_step20", state, state)
    settings = small_settings(from_pretrained=str(path), fused_qkv=True, use_liger_rope=False)
    model = build_model(settings, torch.float32, "cpu", use_ema=True)
    original = small_mmdit()
    inputs = small_inputs(original)
    torch.testing.assert_close(model(**inputs), original(**inputs), atol=1e-5, rtol=1e-5)


def test_averaged_weights_are_read_in_parts(tmp_path, small_settings, state, monkeypatch):
    monkeypatch.setattr("opensora.models.weights.READ_BYTES", 4000)
    path = write_checkpoint(tmp_path / "epoch0-global_step10", state, state)
    settings = small_settings(from_pretrained=str(path))
    assert_holds(build_model(settings, torch.float32, "cpu", use_ema=True), state)


def test_without_averaged_weights(tmp_path, small_settings, state):
    path = write_checkpoint(tmp_path / "epoch0-global_step10", state)
    with pytest.raises(FileNotFoundError, match=r"asked for, and \S+epoch0-global_step10 has none \(ema/\)"):
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu", use_ema=True)
    with pytest.raises(ValueError, match="use_ema=True needs a checkpoint"):
        build_model(small_settings(), torch.float32, "cpu", use_ema=True)


# ------------------------------------------------------------------------------------------- files that are wrong


def cut_short(path):
    os.truncate(path, path.stat().st_size - 100)
    return path


def garbage(path):
    path.write_bytes(b"<html>not found</html>" * 20)
    return path


@pytest.mark.parametrize("spoil", [cut_short, garbage])
@pytest.mark.parametrize("write", [as_safetensors, as_torch_file])
def test_spoilt_files(tmp_path, small_settings, state, write, spoil):
    path = spoil(write(tmp_path, state))
    with pytest.raises(ValueError, match=f"{path.name} (is not a whole safetensors file|can't be read)") as error:
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")
    assert "\n" not in str(error.value)


def test_absent_shard(tmp_path, small_settings, state):
    path = as_checkpoint(tmp_path, state)
    (path / "model" / "model-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002.safetensors, which is not there"):
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")


def test_index_that_does_not_fit_its_shards(tmp_path, small_settings, state):
    path = as_checkpoint(tmp_path, state)
    first = path / "model" / "model-00001.safetensors"
    save_file(without(load_file(first), "img_in.weight"), first)
    with pytest.raises(ValueError, match=r"names img_in.weight in model-00001.safetensors, which lacks it"):
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")


def test_two_indexes(tmp_path, small_settings, state):
    path = as_checkpoint(tmp_path, state)
    (path / "model" / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"has 2 indexes \(model/model.safetensors.index.json, .*: name the one to load"
    ):
        build_model(small_settings(from_pretrained=str(path)), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"other.safetensors.index.json is no index of weights"):
        open_weights(path / "model" / "other.safetensors.index.json")


def test_folder_of_several_files(tmp_path, small_settings, state):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"2 files of weights and no \*.index.json \(a.safetensors, b.safetensors\): name"
    ):
        build_model(small_settings(from_pretrained=str(tmp_path)), torch.float32, "cpu")


def test_weights_that_are_no_floats(tmp_path, small_settings, state):
    quantised = state | {"img_in.weight": state["img_in.weight"].to(torch.int8)}
    with pytest.raises(ValueError, match=r"holds 1 tensors that are no floats \(img_in.weight\)"):
        load(tmp_path, quantised, small_settings())


def test_not_a_state_dict(tmp_path, small_settings, state):
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is not a state dict"):
        build_model(small_settings(from_pretrained=str(tmp_path / "model.pt")), torch.float32, "cpu")
    (tmp_path / "model.ckpt").write_text("")
    with pytest.raises(ValueError, match="is no file of weights"):
        build_model(small_settings(from_pretrained=str(tmp_path / "model.ckpt")), torch.float32, "cpu")


def test_nowhere(tmp_path, small_settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "outputs").mkdir()
    for path in ("./nowhere.safetensors", "ckpts/some/nowhere.safetensors", "outputs/exp", "no/epoch0-global_step1"):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file or folder"):
            build_model(small_settings(from_pretrained=path), torch.float32, "cpu")


# ---------------------------------------------------------------------------------------------------- shards


def test_shards_hold_every_tensor_once_and_are_full():
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate([10, 10, 30, 5, 200, 1, 1])}
    shards = plan_shards(tensors, max_bytes=160)
    assert shards == [
        ("model-00001.safetensors", ["t0", "t1"]),
        ("model-00002.safetensors", ["t2", "t3"]),
        ("model-00003.safetensors", ["t4"]),
        ("model-00004.safetensors", ["t5", "t6"]),
    ]


def test_shards_of_the_real_model_are_of_4096_mb(small_settings):
    big = {"hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "mlp_ratio": 4.0, "context_in_dim": 4096}
    with torch.device("meta"):
        from opensora.registry import MODELS

        model = MODELS.build(small_settings(**big, depth=19, depth_single_blocks=38)).bfloat16()
    tensors = model.state_dict()
    shards = plan_shards(tensors)
    sizes = [sum(tensors[name].nbytes for name in names) for _, names in shards]
    assert len(shards) == 6 and max(sizes) <= 4096 * 2**20 and sum(sizes) == sum(t.nbytes for t in tensors.values())
    assert [name for _, names in shards for name in names] == list(tensors)


def test_shard_and_index_files(tmp_path, state):
    shards = plan_shards(state, 20_000)
    tensors = {**state, "img_in.weight": state["img_in.weight"].T.contiguous().T}  # not contiguous
    for name, keys in shards:
        save_shard(tmp_path / name, {key: tensors[key] for key in keys})
    (tmp_path / INDEX_NAME).write_text(format_index(state, shards))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values()) / 2**20
    for name, tensor in state.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_shard_is_synced_before_it_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), fsync(fd)))
    save_shard(tmp_path / "a.safetensors", {"x": torch.ones(1000)})
    file = (tmp_path / "a.safetensors").stat()
    files = [(entry.st_ino, entry.st_size) for entry in synced if stat.S_ISREG(entry.st_mode)]
    assert files == [(file.st_ino, file.st_size)]


def test_shards_can_be_read_by_whom_the_folder_says(tmp_path):
    (tmp_path / "other").touch()
    save_shard(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
