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
        ("--motion-score much", "motion_score='much' must be a number, 1 to 7, or 'dynamic'"),
        ("--sampling_option.step_cache -1", "sampling_option.step_cache=-1.0 must be at least 0"),
        ("--sampling_option.flow_shift 0", "sampling_option.flow_shift=0.0 must be above 0"),
        (
            "--sampling_option.flow_shift 3 --sampling_option.shift False",
            "flow_shift=3.0 shifts nothing with sampling_option.shift=False: leave one of them out",
        ),
        ("--sampling_option.method distill", "sampling_option.guidance=4.0 is told to nobody"),
        ("--motion-score 99", "motion_score='99' must be a number, 1 to 7"),
        ("--motion-score nan", "motion_score='nan' must be a number, 1 to 7"),
        ("--crf 60", "crf=60 must be at most 51"),
        ("--seed 18446744073709551616", "seed=18446744073709551616 must be at most 9223372036854775807"),
        ("--neg caf\udce9", "neg is not text in UTF-8 ('caf\\udce9', at 3)"),
        ("--dtype bfloat16", "dtype='bfloat16' is unknown"),
        ("--plugin zero3", "plugin='zero3' is unknown"),
        ("--plugin hybrid --plugin_config dict(tp_size=2)", "tp_size=2 * pp_size=1 * sp_size=1 = 2 does not divide"),
        ("--plugin_ae hybrid --plugin_config_ae dict(tp_size=2)", "plugin_config_ae: tp_size=2"),
        (
            "--plugin_ae hybrid --plugin_config_ae dict(tp_size=3)",
            "3 ranks share the autoencoder, and plugin_config lets 1 share a model: make both the same",
        ),
        ("--use-t2i2v True", "use_t2i2v=True needs img_flux"),
        ("--clip.shardformer True", "clip.shardformer=True: Shardformer is for T5 alone here"),
    ],
)
def test_broken_rules(load, overrides, complaint):
    with pytest.raises(ValueError) as error:
        validate(load("--prompt", "sea", *overrides.split()), world_size=3)
    assert complaint in one_line(error)


@pytest.mark.parametrize("overrides", ["--refine-prompt True", "--motion-score dynamic"])
def test_a_language_model_has_to_be_named(load, monkeypatch, overrides):
    cfg = load("--prompt", "sea", *overrides.split())
    validate(cfg, 1)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError) as error:
        require_available(cfg)
    assert "asks a language model, and there is none: set OPENAI_API_KEY, or OPENAI_BASE_URL" in one_line(error)
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(ValueError, match="OPENAI_BASE_URL=localhost:8000 must begin with http://"):
        require_available(cfg)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    require_available(cfg)


IMAGE_MODEL = """
use_t2i2v = True
img_flux = {**model, "guidance_embed": True, "cond_embed": False}
img_flux_ae = dict(type="autoencoder_2d", z_channels=16)
"""


@pytest.fixture
def load_t2i2v(tmp_path):
    path = tmp_path / "t2i2v.py"
    path.write_text(CONFIG + IMAGE_MODEL)
    return lambda *overrides: load_config([str(path), "--prompt", "sea", *overrides], InferenceSettings)


def test_a_first_frame_of_its_own_is_valid(load_t2i2v):
    for cond_type in ("t2v", "i2v_head", "i2v_loop"):
        cfg = load_t2i2v("--cond_type", cond_type)
        validate(cfg, 1)
        require_available(cfg)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--num-frames 1", "num_frames=1 is an image: take configs/diffusion/inference/t2i_768px.py"),
        ("--cond_type v2v_head", "use_t2i2v=True draws one frame, and cond_type='v2v_head' takes more"),
        ("--img_resolution 8", "img_resolution='8': resolution '8' is unknown"),
        ("--img_flux.vec_in_dim 8", "img_flux.vec_in_dim=8 and model.vec_in_dim=16 must be equal"),
        ("--img_flux.hidden_size 60", "img_flux.axes_dim"),
        ("--img_flux_ae.z_channels 8", "img_flux.in_channels=64 does not fit img_flux_ae"),
        ("--model.cond-embed False", "use_t2i2v=True needs a model that takes conditions"),
    ],
)
def test_broken_rules_of_a_first_frame(load_t2i2v, overrides, complaint):
    with pytest.raises(ValueError) as error:
        validate(load_t2i2v(*overrides.split()), 1)
    assert complaint in one_line(error)


def test_paths_that_do_not_exist(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        check_paths(load("--prompt", "sea"))
    assert "model.from_pretrained='./outputs/none' does not exist" in one_line(error)
