"""The documented configs: their values, that they are valid, and what they say where this version can't run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from opensora.config import load_config
from opensora.inference import settings as inference
from opensora.training import settings as training

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "configs.json").read_text())
TRAIN = [name for name in GOLDEN if "/train/" in name]
PLUGINS = [name for name in GOLDEN if "/plugins/" in name]
INFERENCE = [name for name in GOLDEN if "/inference/" in name and name not in PLUGINS]


@pytest.fixture
def table(tmp_path) -> str:
    path = tmp_path / "table.csv"
    path.write_text("path,text,num_frames,height,width,aspect_ratio,resolution,fps\n")
    return str(path)


def load_train(name: str, table: str, *overrides: str) -> Config:
    return load_config([str(ROOT / name), "--dataset.data-path", table, *overrides], training.TrainSettings)


def load_inference(name: str, *overrides: str) -> Config:
    return load_config([str(ROOT / name), "--prompt", "raining, sea", *overrides], inference.InferenceSettings)


def project(found, golden):
    """`found` cut to the keys of `golden`: the resolved config holds defaults beside."""
    if not isinstance(golden, dict):
        return found
    return {key: project(found[key], golden[key]) for key in golden}


def as_json(cfg: Config) -> dict:
    return json.loads(json.dumps(cfg.to_dict()))


def test_every_documented_config_is_there():
    assert len(TRAIN) == 6 and len(INFERENCE) == 5 and len(PLUGINS) == 3


@pytest.mark.parametrize("name", GOLDEN)
def test_the_file_says_what_is_documented_and_no_more(name):
    assert as_json(Config.fromfile(ROOT / name)) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_file_opens_with_what_it_is_for(name):
    assert (ROOT / name).read_text().startswith('"""')


@pytest.mark.parametrize("name", TRAIN)
def test_train_config_resolves_and_is_valid(name, table):
    cfg = load_train(name, table)
    assert project(as_json(cfg), GOLDEN[name]) == GOLDEN[name]
    training.validate(cfg, world_size=8)


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_config_resolves_and_is_valid(name):
    cfg = load_inference(name)
    assert project(as_json(cfg), GOLDEN[name]) == GOLDEN[name]
    inference.validate(cfg, world_size=8)


@pytest.mark.parametrize("name", TRAIN)
def test_this_version_has_all_that_a_train_config_asks_for(name, table):
    training.require_available(load_train(name, table))


@pytest.mark.parametrize("name", INFERENCE)
def test_this_version_has_all_that_an_inference_config_asks_for(name):
    inference.require_available(load_inference(name))


@pytest.mark.parametrize("name", TRAIN)
def test_the_remedies_together_make_a_config_that_can_run(name, table):
    """Word for word what `require_available` proposes for each config."""
    overrides = []
    if "stage2" in name:
        kept = "{'reduce_bucket_size_in_m': 128, 'overlap_allgather': False}"
        overrides += ["--plugin", "zero2", "--plugin_config", kept]
    cfg = load_train(name, table, *overrides)
    training.validate(cfg, world_size=8)
    training.require_available(cfg)


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),
    [
        (["--lr", "1e-5"], "optim.lr", 1e-5),
        (["--wandb", "True"], "wandb", True),
        (
            ["--load", "outputs/a/epoch0-global_step1", "outputs/a/epoch0-global_step2"],
            "load",
            ["outputs/a/epoch0-global_step1", "outputs/a/epoch0-global_step2"],
        ),
        (["--load", "outputs/a", "--start-step", "0", "--start-epoch", "0"], "start_epoch", 0),
        (["--max-steps", "5"], "max_steps", 5),
        (["--outputs", "D", "--exp-name", "E"], "exp_name", "E"),
        (["--ckpt-every", "7", "--log-every", "1"], "ckpt_every", 7),
        (["--model.depth", "1", "--model.depth_single_blocks", "1"], "model.depth_single_blocks", 1),
        (["--grad_ckpt_setting", "(1, 2)"], "model.grad_ckpt_settings", (1, 2)),
        (["--resize", "exact"], "dataset.resize", "exact"),
    ],
)
def test_documented_training_overrides(table, overrides, name, expected):
    value = load_train("configs/diffusion/train/stage1.py", table, *overrides)
    for key in name.split("."):
        value = value[key]
    assert value == expected


def test_documented_inference_overrides():
    cfg = load_inference(
        "configs/diffusion/inference/256px.py",
        *("--save-dir", "out", "--model.from_pretrained", "outputs/a/epoch0-global_step1", "--num-sample", "2"),
        *("--use-ema", "True", "--num_frames", "5", "--guidance", "3", "--motion-score", "7"),
        *("--cond_type", "i2v_head", "--ref", "first.png"),
    )
    inference.validate(cfg, world_size=1)
    assert cfg.prompt == "raining, sea" and cfg.save_dir == "out" and cfg.num_sample == 2 and cfg.use_ema is True
    assert cfg.sampling_option.num_frames == 5 and cfg.sampling_option.guidance == 3.0
    assert cfg.model.from_pretrained == "outputs/a/epoch0-global_step1" and cfg.motion_score == "7"
