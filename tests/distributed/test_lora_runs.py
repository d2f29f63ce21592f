"""Training adapters: only they change, a resumed run equals one that was never stopped, a merge equals the adapted."""

import json
import shutil

import numpy as np
import pytest
import torch
from runs import numbers, train
from shapes_world import REPOSITORY, SMALL_MODEL
from video_files import decode_all

from opensora.checkpoint_folder import list_checkpoints
from opensora.models.export import ExportOptions, export_weights
from opensora.models.lora import Adapters
from opensora.models.sources import open_model
from opensora.models.weight_files import open_averages, open_weights, save_shard

LORA = ["--lora-config", "dict(r=4, lora_alpha=8)", "--lora-config.lora-dropout", "0.1"]


@pytest.fixture(scope="module")
def base(one_rank, shapes, tmp_path_factory):
    """A checkpoint of all weights after two updates."""
    folder = tmp_path_factory.mktemp("base")
    arguments = ["--outputs", str(folder), "--exp-name", "base", "--max-steps", "2", "--num-workers", "0"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments))
    (checkpoint,) = list_checkpoints(folder / "base")
    return checkpoint


def adapters_of(run):
    (*_, newest) = list_checkpoints(run)
    return Adapters.read(newest)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_adapters_train_and_resume_exactly(two_ranks, shapes, base, tmp_path, dtype):
    common = ["--model.from-pretrained", str(base), *LORA, "--dtype", dtype, "--num-workers", "0"]
    common += ["--ema-decay", "0.5", "--outputs", str(tmp_path), "--ckpt-every", "2", "--grad-checkpoint", "True"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "whole", "--max-steps", "4"))
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "parts", "--max-steps", "2"))
    resume = ["--exp-name", "parts", "--max-steps", "4", "--load", str(parts)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *resume))
    assert numbers(parts) == numbers(whole)
    first, second = adapters_of(whole), adapters_of(parts)
    assert first.base == second.base == str(base.absolute())
    assert all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(first.pairs.values(), second.pairs.values(), strict=True)
    )
    assert any(b.count_nonzero() for _, b in first.pairs.values())
    averages = [open_averages(list_checkpoints(run)[-1]) for run in (whole, parts)]
    a, b = (source.read(list(source.shapes)) for source in averages)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_adapters_holds_them_alone(one_rank, shapes, base, tmp_path):
    arguments = ["--model.from-pretrained", str(base), *LORA, "--outputs", str(tmp_path), "--exp-name", "run"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments, "--max-steps", "1", "--num-workers", "0"))
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert not (checkpoint / "model").exists()
    assert json.loads((checkpoint / "lora" / "adapter_config.json").read_text())["r"] == 4
    merged = Adapters.read(checkpoint).merged(open_weights(base), "here")
    before, after = (source.read(list(merged.shapes)) for source in (open_weights(base), merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name in Adapters.read(checkpoint).pairs for name in changed)


def test_what_adapters_go_on_from(one_rank, shapes, base, tuned, tmp_path, capfd):
    """Their own base, whatever is given, and the dropout that is given; the base's file may be a link, as in a hub
    cache."""
    link = tmp_path / "base.safetensors"
    link.symlink_to(next((base / "model").glob("*.safetensors")))
    arguments = ["--model.from-pretrained", str(link), "--lora-config", "dict(r=4, lora_alpha=8, lora_dropout=0.25)"]
    arguments += ["--outputs", str(tmp_path), "--num-workers", "0", "--max-steps"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments, "1", "--exp-name", "linked"))
    assert adapters_of(tmp_path / "linked").base == str(link)
    one_rank(train, shapes.root, shapes.train_arguments(*arguments, "3", "--exp-name", "on", "--load", str(tuned)))
    assert f"were trained on {base}: taken instead of {link}" in (tmp_path / "on" / "log.txt").read_text()
    config = json.loads((list_checkpoints(tmp_path / "on")[-1] / "lora" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.25 and "final_layer.linear" in config["target_modules"]


def train_on_a_base_without_cond_in(context, root, arguments):
    try:
        train(context, root, arguments)
    except ValueError as error:
        return str(error)


def test_a_condition_that_nothing_would_learn_is_refused(one_rank, shapes, base, tmp_path):
    state = read(open_weights(base))
    save_shard(tmp_path / "t2v.safetensors", {name: t for name, t in state.items() if not name.startswith("cond_in")})
    arguments = ["--model.from-pretrained", str(tmp_path / "t2v.safetensors"), *LORA, "--outputs", str(tmp_path)]
    arguments += ["--max-steps", "1", "--num-workers", "0", "--exp-name"]
    (complaint,) = one_rank(train_on_a_base_without_cond_in, shapes.root, shapes.train_arguments(*arguments, "refused"))
    assert "has no cond_in, and adapters would leave it zero" in complaint
    targets = ["--lora-config.target-modules", "['cond_in', 'q_proj']"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments, "trained", *targets))
    assert "cond_in.weight" in adapters_of(tmp_path / "trained").pairs


@pytest.fixture(scope="module")
def tuned(one_rank, shapes, base, tmp_path_factory):
    """A checkpoint of adapters after two updates on `base`, with averages."""
    folder = tmp_path_factory.mktemp("tuned")
    arguments = ["--model.from-pretrained", str(base), *LORA, "--outputs", str(folder), "--exp-name", "tuned"]
    arguments += ["--max-steps", "2", "--num-workers", "0", "--ema-decay", "0.5"]
    arguments += ["--lora-config.target-modules", "['q_proj', 'linear2', 'final_layer.linear']"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments))
    (checkpoint,) = list_checkpoints(folder / "tuned")
    return checkpoint


def read(source):
    return source.read(list(source.shapes))


def test_a_checkpoint_of_adapters_opens_as_the_whole_model(base, tuned):
    expected = read(Adapters.read(tuned).merged(open_weights(base), "here"))
    for found in (open_model(tuned), open_model(base, lora=tuned)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read(found).items())
    averaged = read(open_model(tuned, use_ema=True))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in averaged.items())
    unscaled = read(open_model(tuned, lora_scale=0.0))
    assert all(torch.equal(tensor, unscaled[name]) for name, tensor in read(open_weights(base)).items())


def test_the_base_may_have_another_layout(base, tuned, tmp_path):
    export_weights(str(base), tmp_path / "base_flux.safetensors", ExportOptions(to="flux"))
    found = read(open_model(tmp_path / "base_flux.safetensors", lora=tuned))
    assert all(torch.equal(tensor, found[name]) for name, tensor in read(open_model(tuned)).items())


def test_adapters_are_merged_into_an_export(base, tuned, tmp_path):
    export_weights(str(tuned), tmp_path / "own.safetensors", ExportOptions(to="open-sora"))
    export_weights(str(base), tmp_path / "given.safetensors", ExportOptions(to="open-sora", lora=tuned))
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "given.safetensors").read_bytes()
    merged = read(open_weights(tmp_path / "own.safetensors"))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in read(open_model(tuned)).items())


def test_adapters_without_what_they_were_trained_on(tuned, tmp_path):
    moved = tmp_path / tuned.name
    shutil.copytree(tuned, moved)
    config = moved / "lora" / "adapter_config.json"
    there = json.loads(config.read_text())["base_model_name_or_path"]
    config.write_text(config.read_text().replace(there, "/nowhere/base"))
    with pytest.raises(FileNotFoundError, match=r"not where it was \(/nowhere/base\): give it in"):
        open_model(moved)


def sample(shapes, folder, *options):
    """The video of one prompt after three steps."""
    config = str(REPOSITORY / "configs/diffusion/inference/shapes.py")
    common = ["--save-dir", str(folder), "--prompt", "a red circle", "--num-steps", "3", "--crf", "0", *SMALL_MODEL]
    shapes.run("scripts/diffusion/inference.py", config, *common, "--use-ema", "False", *options)
    (video,) = folder.rglob("*.mp4")
    return decode_all(video)


@pytest.mark.slow
def test_samples_before_the_first_update_are_those_of_the_base(one_rank, shapes, base, tuned, tmp_path):
    arguments = ["--model.from-pretrained", str(base), *LORA, "--outputs", str(tmp_path), "--exp-name", "new"]
    one_rank(train, shapes.root, shapes.train_arguments(*arguments, "--max-steps", "0", "--num-workers", "0"))
    of_base = sample(shapes, tmp_path / "base", "--model.from-pretrained", str(base))
    assert np.array_equal(of_base, sample(shapes, tmp_path / "new_", "--model.from-pretrained", str(tmp_path / "new")))
    strong = ("--lora-scale", "1000")  # what two updates add is not seen in 8 bits
    of_tuned = sample(shapes, tmp_path / "tuned", "--model.from-pretrained", str(base), "--lora", str(tuned), *strong)
    assert not np.array_equal(of_base, of_tuned)
