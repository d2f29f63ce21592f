"""The rules among sampling settings, by what a broken one says."""

from __future__ import annotations

import pytest

from opensora.config import load_config
from opensora.inference.settings import InferenceSettings, check_paths, require_available, validate

CONFIG = """
model = dict(
    type="flux", in_channels=64, vec_in_dim=16, context_in_dim=32, hidden_size=64, mlp_ratio=4, num_heads=4, depth=1,
    depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False, fused_qkv=False,
    cond_embed=True, from_pretrained="./outputs/none",
)
ae = dict(type="linear_causal", from_pretrained="./ckpts/shapes/ae.safetensors")
t5 = dict(type="text_embedder", from_pretrained="./ckpts/shapes/t5", max_length=16)
clip = dict(type="text_embedder", from_pretrained="./ckpts/shapes/clip", max_length=16)
sampling_option = dict(resolution="256px", aspect_ratio="16:9", num_frames=9)
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return lambda *overrides: load_config([str(path), *overrides], InferenceSettings)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_small_config_is_valid(load):
    cfg = load("--prompt", "raining, sea")
    validate(cfg, world_size=3)
    require_available(cfg)
    assert cfg.dataset == {"type": "text"} and cfg.plugin is None and cfg.sampling_option.seed is None
    assert cfg.sampling_option.guidance == 4.0 and cfg.num_sample == 1 and cfg.save_dir == "samples"


def test_prompts_from_a_file_or_from_nowhere(load):
    validate(load("--dataset.data-path", "prompts.csv"), 1)
    with pytest.raises(ValueError, match="nothing to draw: give --prompt"):
        validate(load(), 1)


def test_short_names_reach_the_sampling_option(load):
    cfg = load(
        "--num_frames", "5", "--num-steps=7", "--guidance", "3", "--resolution", "768px", "--aspect_ratio", "1:1"
    )
    expected = {"num_frames": 5, "num_steps": 7, "guidance": 3.0, "resolution": "768px", "aspect_ratio": "1:1"}
    assert {key: cfg.sampling_option[key] for key in expected} == expected
    assert not expected.keys() & cfg.keys()
    assert load("--ckpt-path", "a", "b").model.from_pretrained == ["a", "b"]
    assert load("--seed", "3").sampling_option.seed is None


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--num-frames 8", "sampling_option.num_frames: 8 frames do not fit ae.type='linear_causal'"),
        ("--num-frames 0", "sampling_option.num_frames=0 must be at least 1"),
        ("--num-steps 0", "sampling_option.num_steps=0 must be at least 1"),
        ("--num-sample 0", "num_sample=0 must be at least 1"),
        ("--batch-size 0", "batch_size=0 must be at least 1"),
        ("--fps-save 0", "fps_save=0 must be at least 1"),
        ("--guidance -1", "sampling_option.guidance=-1.0 must be at least 0"),
        ("--resolution none", "sampling_option has no size"),
        ("--resolution big", "resolution 'big' is unknown"),
        ("--aspect-ratio 7:1", "7:1"),
        ("--sampling_option.height 64", "width"),
        ("--sampling_option.method euler", "sampling_option.method='euler' is unknown"),
        ("--cond_type i2v", "cond_type: unknown condition 'i2v'"),
        ("--cond_type i2v_head", "cond_type='i2v_head' needs a reference: set --ref FILE"),
        ("--cond_type i2v_head --ref a.png --model.cond-embed False", "needs a model that takes conditions"),
        ("--dtype bfloat16", "dtype='bfloat16' is unknown"),
        ("--plugin zero3", "plugin='zero3' is unknown"),
        ("--plugin hybrid --plugin_config dict(tp_size=2)", "tp_size=2 * pp_size=1 * sp_size=1 = 2 does not divide"),
        ("--plugin_ae hybrid --plugin_config_ae dict(tp_size=2)", "plugin_config_ae: tp_size=2"),
        ("--use-t2i2v True", "use_t2i2v=True needs img_flux"),
        ("--clip.shardformer True", "clip.shardformer=True: Shardformer is for T5 alone here"),
    ],
)
def test_broken_rules(load, overrides, complaint):
    with pytest.raises(ValueError) as error:
        validate(load("--prompt", "sea", *overrides.split()), world_size=3)
    assert complaint in one_line(error)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--plugin hybrid", "plugin='hybrid': tensor and sequence parallelism are not available in this version"),
        ("--offload True", "offload=True is not available in this version: set --offload False"),
        ("--refine-prompt True", "refine_prompt=True is not available in this version"),
    ],
)
def test_what_later_versions_bring(load, overrides, complaint):
    with pytest.raises(ValueError) as error:
        require_available(load("--prompt", "sea", *overrides.split()))
    assert complaint in one_line(error)


def test_paths_that_do_not_exist(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        check_paths(load("--prompt", "sea"))
    assert "model.from_pretrained='./outputs/none' does not exist" in one_line(error)
