"""The rules among training settings, by what a broken one says."""

from __future__ import annotations

import json

import pytest

from opensora.config import load_config
from opensora.training.prompt_samples import eval_size
from opensora.training.settings import OPTIMIZERS, TrainSettings, check_paths, require_available, validate

CONFIG = """
model = dict(
    type="flux", in_channels=64, vec_in_dim=16, context_in_dim=32, hidden_size=64, mlp_ratio=4, num_heads=4, depth=1,
    depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False, fused_qkv=False,
)
ae = dict(type="linear_causal", from_pretrained="{folder}/ae.safetensors")
t5 = dict(type="text_embedder", from_pretrained="{folder}/t5", max_length=16)
clip = dict(type="text_embedder", from_pretrained="{folder}/clip", max_length=16)
dataset = dict(type="video_text", data_path="{folder}/table.csv")
bucket_config = {{"64px": {{1: (1.0, 4), 9: (0.5, 2)}}}}
"""


@pytest.fixture
def folder(tmp_path):
    """A config, and all that it names."""
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "table.csv").write_text("path,text\n")
    (tmp_path / "ae.safetensors").write_bytes(b"")
    for name, config in {
        "t5": {"model_type": "t5", "d_model": 32},
        "clip": {"model_type": "clip_text_model", "hidden_size": 16},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def load(folder):
    return lambda *overrides: load_config([str(folder / "config.py"), *overrides], TrainSettings)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_small_config_is_valid_on_any_number_of_processes(load):
    for world_size in (1, 2, 7):
        validate(load(), world_size)
    require_available(load())
    check_paths(load())


def test_defaults_that_every_run_has(load):
    cfg = load()
    assert cfg.optim.to_dict() == {"cls": "HybridAdam", "lr": 5e-5, "eps": 1e-15, "weight_decay": 0.0}
    assert (cfg.lr, cfg.eps, cfg.plugin, cfg.dtype, cfg.max_steps, cfg.load) == (
        5e-5,
        1e-15,
        "zero2",
        "bf16",
        None,
        None,
    )
    assert cfg.plugin_config == {} and cfg.dropout_ratio == {"t5": 0.0, "clip": 0.0}
    assert (cfg.model.from_pretrained, cfg.model.grad_ckpt_settings) == (None, None)


def test_an_optimizers_arguments_are_its_own(load):
    assert load("--optim.betas", "(0.9, 0.95)", "--optim.cls", "AdamW").optim.betas == (0.9, 0.95)
    sgd = load("--optim", "dict(cls='SGD', lr=0.1, momentum=0.9)")
    assert sgd.optim.to_dict() == {"cls": "SGD", "lr": 0.1, "momentum": 0.9}
    assert sgd.eps is None
    validate(sgd, 1)
    with pytest.raises(ValueError, match=r"optim\.momentum is not a setting of optimizer 'HybridAdam'"):
        load("--optim.momentum", "0.9")
    assert "HybridAdam" in OPTIMIZERS.names() and "Optimizer" not in OPTIMIZERS.names()
    eight = load("--optim", "dict(cls='Adam8bit', lr=1e-4, weight_decay=0.1, no_decay_norms_and_biases=True)")
    validate(eight, 1)
    with pytest.raises(ValueError, match=r"optim\.cls='Muon' orthogonalises whole matrices"):
        load("--optim.cls", "Muon")


RULES = [
    ("--epochs 0", "epochs=0 must be at least 1"),
    ("--accumulation-steps 0", "accumulation_steps=0 must be at least 1"),
    ("--grad-clip -1", "grad_clip=-1.0 must be at least 0"),
    ("--log-every 0", "log_every=0 must be at least 1"),
    ("--ckpt-every -1", "ckpt_every=-1 must be at least 0"),
    ("--keep-n-latest 0", "keep_n_latest=0 must be at least 1"),
    ("--max-steps -1", "max_steps=-1 must be at least 0"),
    ("--num-workers -1", "num_workers=-1 must be at least 0"),
    ("--prefetch-factor 0", "prefetch_factor=0 must be at least 1"),
    ("--warmup-steps -1", "warmup_steps=-1 must be at least 0"),
    ("--seed -1", "seed=-1 must be at least 0"),
    ("--seed 9223372036854775808", "seed=9223372036854775808 must be at most 9223372036854775807"),
    ("--dist-timeout 0", "dist_timeout=0 must be above 0 and at most 10000000 seconds"),
    ("--dist-timeout 1e15", "dist_timeout=1e+15 must be above 0 and at most 10000000 seconds"),
    (
        "--plugin-config.overlap-allgather True --model.compile True",
        "plugin_config.overlap_allgather=True: a compiled model does not wait",
    ),
    ("--dist-timeout 600", "other ranks wait for it for dist_timeout=600 s: set e.g. --dataset.read-timeout 150"),
    ("--lr 0", "optim.lr=0.0 must be above 0"),
    ("--eps -1e-8", "optim.eps=-1e-08 must be at least 0"),
    ("--optim.weight-decay -1", "optim.weight_decay=-1.0 must be at least 0"),
    ("--optim.betas (0.9,1.0)", "optim.betas=(0.9, 1.0) must be in [0, 1)"),
    ("--ema-decay 1", "ema_decay=1.0 must be between 0 and 1"),
    ("--max-skipped-in-row 0", "max_skipped_in_row=0 must be at least 1"),
    ("--skip-spikes 1", "skip_spikes=1.0 must be above 1"),
    ("--auto-resume True", "without exp_name each start makes a new folder: set --exp-name NAME"),
    ("--oom-policy shrink --exp-name a", "set --auto-resume True (and let torchrun --max-restarts N start it)"),
    ("--dropout_ratio.t5 1.5", "dropout_ratio.t5=1.5 must be a probability"),
    ("--dtype bfloat16", "dtype='bfloat16' is unknown"),
    ("--lora-config dict(r=8)", "lora_config needs weights to adapt: set --model.from-pretrained FILE"),
    (
        "--lora-config dict(target_modules=[]) --model.from-pretrained a.pt",
        "lora_config.target_modules=[] adapts nothing",
    ),
    ("--lora-config.init-lora-weights False --model.from-pretrained a.pt", "lora_config.init_lora_weights=False would"),
    ("--lora-config.r 0", "lora_config.r=0 must be at least 1"),
    ("--lora-config.lora-dropout 1.0 --model.from-pretrained a.pt", "lora_config.lora_dropout=1.0 must be at least 0"),
    ("--lora-config.target-modules ['qkv'] --model.from-pretrained a.pt", "no linear layer's name ends in 'qkv'"),
    (
        "--optim dict(cls='Rprop',lr=0.1,no_decay_norms_and_biases=True)",
        "optim.no_decay_norms_and_biases=True: optim.cls='Rprop' decays no weights",
    ),
    ("--plugin zero3", "plugin='zero3' is unknown: one of zero1, zero2, hybrid"),
    ("--plugin-config.sp-size 2", "plugin_config.sp_size=2 needs plugin='hybrid', not 'zero2': set --plugin_config"),
    ("--clip.shardformer True", "clip.shardformer=True: Shardformer is for T5 alone here"),
    ("--model.depth -1", "model.depth=-1 must be at least 0"),
    ("--model.hidden-size 0", "model.hidden_size=0 must be above 0"),
    ("--model.num-heads 3", "model.hidden_size=64 is no multiple of model.num_heads=3"),
    ("--model.axes-dim (4,4,6)", "model.axes_dim=[4, 4, 6] adds up to 14, but a head has hidden_size / num_heads = 64"),
    ("--model.axes-dim (4,5,7)", "model.axes_dim=[4, 5, 7] must be three even numbers"),
    ("--model.axes-dim (8,8)", "model.axes_dim=[8, 8] must be three even numbers"),
    ("--grad-ckpt-setting (-1,0)", "model.grad_ckpt_settings=(-1, 0) must be counts of blocks"),
    ("--grad-ckpt-buffer-size -1", "grad_ckpt_buffer_size=-1 must be at least 0"),
    (
        "--grad-ckpt-buffer-size 8 --grad-checkpoint False",
        "grad_ckpt_buffer_size=8 is for the inputs of recomputed blocks, and grad_checkpoint=False recomputes none",
    ),
    (
        "--grad-ckpt-buffer-size 8 --grad-ckpt-settings (0,0) --grad-ckpt-policy attention",
        "and model.grad_ckpt_settings=(0, 0) recomputes none: raise --grad-ckpt-settings, or --grad-ckpt-buffer-size 0",
    ),
    ("--bucket_config {}", "bucket_config is empty"),
    ("--bucket_config {'64px':{}}", "bucket_config is empty"),
    ("--bucket_config {'small':{1:(1,1)}}", "resolution 'small' is unknown"),
    (
        "--bucket_config.64px.8 (1.0,2)",
        "8 frames do not fit ae.type='linear_causal', which takes 4n + 1 frames or one: use",
    ),
    ("--bucket_config.64px.0 (1.0,2)", "bucket_config.64px.0: 0 frames do not fit"),
    ("--bucket_config.64px.5 (1.5,2)", "bucket_config.64px.5: probability 1.5 must be 0 to 1"),
    ("--bucket_config.64px.5 ((0.5,2),2)", "bucket_config.64px.5: probability (0.5, 2.0) must be 0 to 1"),
    ("--bucket_config.64px.5 (1.0,0)", "bucket_config.64px.5: batch size 0 must be at least 1"),
    ("--model.cond-embed True", "model.cond_embed=True needs conditions to train on: set --condition_config"),
    (
        "--condition_config dict(t2v=1)",
        "condition_config needs a model that takes conditions: set --model.cond-embed True",
    ),
    ("--model.cond-embed True --condition_config dict(t2w=1)", "unknown condition 't2w'"),
    ("--model.cond-embed True --condition_config dict(t2v=0)", "no condition a weight above 0"),
    (
        "--model.cond-embed True --condition_config dict(t2v=-1)",
        "condition_config.t2v=-1.0 must be a weight of 0 or more",
    ),
    ("--dataset.data-path a.txt", "dataset.data_path='a.txt' is no table: a .csv or .parquet file"),
]


@pytest.mark.parametrize(("overrides", "complaint"), RULES)
def test_broken_rules(load, overrides, complaint):
    with pytest.raises(ValueError) as error:
        validate(load(*overrides.split()), world_size=2)
    assert complaint in one_line(error)


@pytest.mark.parametrize(
    "overrides",
    [
        "--bucket_config {'256px_max':{1:(1,1)},'480p_ar16:9':{129:((0.5,0.5),1)}}",
        "--model.cond-embed True --condition_config dict(t2v=1,v2v_head_easy=0.5)",
        "--keep-n-latest none --ema-decay 0.999 --max-steps 0 --warmup-steps none --grad-clip 0",
        "--dataset.data-path a.parquet",
        "--plugin zero1 --plugin_config.reduce-bucket-size-in-m 20",
        "--dtype fp32",
        "--grad-ckpt-buffer-size 8 --grad-ckpt-settings (0,0) --grad-ckpt-policy full",
        "--grad-ckpt-buffer-size 8 --grad-ckpt-settings (0,100)",
    ],
)
def test_legal_settings(load, overrides):
    validate(load(*overrides.split()), world_size=2)


@pytest.mark.parametrize(
    ("sizes", "world_size", "complaint"),
    [
        ("sp_size=2", 8, None),
        ("sp_size=2,tp_size=2", 4, None),
        ("sp_size=4,tp_size=2", 12, "sp_size=4 = 8 does not divide the job's 12 processes: start a multiple of 8"),
        ("sp_size=4", 2, "= 4 does not divide the job's 2 processes"),
        ("tp_size=8", 8, "plugin_config.tp_size=8 does not divide model.num_heads=4"),
        (
            "sp_size=8,sequence_parallelism_mode='all_to_all'",
            8,
            "plugin_config.sp_size=8 does not divide model.num_heads=4",
        ),
        ("sp_size=8,sequence_parallelism_mode='ring_attn'", 8, None),
        ("sp_size=0", 8, "plugin_config.sp_size=0 must be at least 1"),
        ("sp_size=2,enable_sequence_parallelism=False", 8, "plugin_config.sp_size=2 contradicts plugin_config.enable_"),
        ("pp_size=2", 8, "plugin_config.pp_size=2: there is no pipeline parallelism: set it to 1"),
        ("zero_stage=3", 8, "plugin_config.zero_stage=3 must be 0, 1 or 2"),
    ],
)
def test_groups_divide_the_job(load, sizes, world_size, complaint):
    cfg = load("--plugin", "hybrid", "--plugin_config", f"dict({sizes})")
    if complaint is None:
        return validate(cfg, world_size)
    with pytest.raises(ValueError) as error:
        validate(cfg, world_size)
    assert complaint in one_line(error)


def test_latents_fit_the_model_where_both_are_known(load):
    hunyuan = "dict(type='hunyuan_vae', latent_channels=16)"
    validate(load("--ae", hunyuan), 1)
    with pytest.raises(
        ValueError, match=r"model.in_channels=64 does not fit ae: 16 latent channels \* patch_size 1² = 16"
    ):
        validate(load("--ae", hunyuan, "--model.patch-size", "1"), 1)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--dtype fp16", "dtype='fp16' is not available for training in this version: set --dtype bf16 or fp32"),
    ],
)
def test_what_later_versions_bring(load, overrides, complaint):
    with pytest.raises(ValueError) as error:
        require_available(load(*overrides.split()))
    assert complaint in one_line(error)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("--dataset.data-path {folder}/none.csv", "none.csv' does not exist: make it with scripts/cnv/meta.py"),
        ("--dataset.memory-efficient True", "make them with `python scripts/cnv/shard.py {folder}/table.csv`"),
        (
            "--ae.from-pretrained {folder}/none.safetensors",
            "ae.from_pretrained='{folder}/none.safetensors' does not exist",
        ),
        ("--t5.from-pretrained ./none/t5", "t5.from_pretrained='./none/t5' does not exist: see ckpts/README.md"),
        ("--t5.from-pretrained ckpts/none", "t5.from_pretrained='ckpts/none' does not exist"),
        (
            "--model.from_pretrained weights/none.safetensors",
            "model.from_pretrained='weights/none.safetensors' does not",
        ),
    ],
)
def test_paths_that_do_not_exist(load, folder, monkeypatch, override, complaint):
    (folder / "ckpts").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError) as error:
        check_paths(load(*override.format(folder=folder).split()))
    assert complaint.format(folder=folder) in one_line(error)


def test_names_of_the_hub_and_checkpoints_to_choose_from_are_no_paths(load, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for model in ("owner/repo/model.safetensors", "outputs/x/epoch*-global_step*"):
        check_paths(load("--t5.from-pretrained", "google/t5-v1_1-xxl", "--model.from_pretrained", model))


def test_text_encoders_are_as_wide_as_the_model_takes_them(load):
    with pytest.raises(ValueError) as error:
        check_paths(load("--model.context-in-dim", "48"))
    assert "model.context_in_dim=48, but t5.from_pretrained=" in one_line(error)
    assert "is 32 wide: set --model.context-in-dim 32" in one_line(error)
    with pytest.raises(ValueError, match=r"model\.vec_in_dim=48, but clip"):
        check_paths(load("--model.vec-in-dim", "48"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--eval-prompts a", "eval_prompts='a' has no use with eval_every=0: set --eval-every 500"),
        ("--eval-data-path {folder}/table.csv", "has no use with eval_every=0"),
        ("--eval-every 5 --eval-samples 0", "there is nothing to evaluate"),
        ("--eval-every -1", "eval_every=-1 must be at least 0"),
        ("--eval-every 5 --eval-times [0.5,0]", "eval_times=[0.5, 0.0]: 0.0 must be above 0"),
        ("--eval-every 5 --eval-times []", "eval_times=[] gives the loss no time"),
        ("--eval-every 5 --eval-data-path x.txt", "eval_data_path='x.txt' is no table"),
        ("--eval-every 5 --eval-prompts a --eval-option.num-frames 7", "eval_option.num_frames=7 does not fit"),
        ("--eval-every 5 --eval-prompts a --eval-option.aspect-ratio 7:5", "7:5"),
        ("--eval-every 5 --eval-prompts a --eval-option.method x", "eval_option.method='x' is unknown"),
        ("--eval-every 5 --eval-option.steps 7", "eval_option.steps"),
    ],
)
def test_evaluations_that_cannot_be(load, folder, overrides, complaint):
    with pytest.raises(ValueError) as error:
        validate(load(*overrides.format(folder=folder).split()), 1)
    assert complaint in one_line(error)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("--eval-data-path {folder}/none.csv", "none.csv' does not exist: make it with scripts/cnv/meta.py"),
        ("--eval-prompts {folder}/none.txt", "eval_prompts={folder}/none.txt: there is no such file"),
        ("--eval-prompts {folder}/refs.csv", "samples while training are of text alone"),
        ("--eval-prompts {folder}/table.csv", "eval_prompts={folder}/table.csv: there is no prompt in it"),
    ],
)
def test_files_of_evaluations(load, folder, overrides, complaint):
    (folder / "refs.csv").write_text("text,ref\na,b.png\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check_paths(load("--eval-every", "5", *overrides.format(folder=folder).split()))
    assert complaint.format(folder=folder) in one_line(error)


def test_samples_have_the_size_of_the_lowest_resolution_if_nothing_else_is_said(load):
    size = eval_size(load())
    assert (size.num_frames, size.name) == (9, "64px") and size.width > size.height
    chosen = ("--eval-option.resolution", "128px", "--eval-option.aspect-ratio", "1:1", "--eval-option.num-frames", "1")
    size = eval_size(load(*chosen))
    assert (size.num_frames, size.height, size.width, size.name) == (1, 128, 128, "128px")


def test_reads_may_take_long_where_no_rank_waits_for_them(load):
    validate(load("--dist-timeout", "60"), 1)
    validate(load("--dist-timeout", "60", "--num-workers", "0"), 2)
    validate(load("--dist-timeout", "60", "--dataset.read-timeout", "20"), 2)
