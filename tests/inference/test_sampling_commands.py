"""inference.py as a user runs it, with the demo's encoders and a model that has not learned anything."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from transformers import AutoTokenizer

from opensora.config import load_config
from opensora.inference.pipeline import Pipeline
from opensora.inference.plan import make_plan, model_text
from opensora.inference.settings import InferenceSettings
from opensora.inference.size import sample_size
from opensora.models.weight_files import INDEX_NAME, format_index, plan_shards, save_shard
from opensora.models.weights import build_model

MODEL = {
    "type": "flux",
    "from_pretrained": None,
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "in_channels": 64,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 8, 8],
    "theta": 10_000,
    "qkv_bias": True,
    "cond_embed": True,
}
CONFIG = f"""
dtype = "fp32"
fps_save = 8
batch_size = 2
sampling_option = dict(resolution="64px", aspect_ratio="1:1", num_frames=9, num_steps=3, guidance=3.0)
model = {MODEL}
ae = dict(type="linear_causal", from_pretrained="./ckpts/shapes/ae.safetensors")
t5 = dict(type="text_embedder", from_pretrained="./ckpts/shapes/t5", max_length=32)
clip = dict(type="text_embedder", from_pretrained="./ckpts/shapes/clip", max_length=32)
"""
SCRIPT = "scripts/diffusion/inference.py"


@pytest.fixture(scope="module")
def sample(shapes):
    """sample(*arguments, **how) -> the finished process; `how` as ShapesWorld.run has it."""
    (shapes.root / "sampling.py").write_text(CONFIG)
    return lambda *arguments, **how: shapes.run(SCRIPT, "sampling.py", *arguments, **how)


def read_video(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.mark.slow
def test_two_ranks_sample_a_list_from_first_frames(shapes, sample):
    video = read_video(shapes.root / "datasets/shapes/00004.mp4")
    Image.fromarray(video[0].astype(np.uint8)).save(shapes.root / "first.png")
    quoted = 'a "red" circle,\nслева 雨'
    (shapes.root / "list.csv").write_text(
        'text,ref,name\n"a ""red"" circle,\nслева 雨",first.png,one\na blue square,first.png,two\n', encoding="utf-8"
    )
    sample("--dataset.data-path", "list.csv", "--cond_type", "i2v_head", "--save-dir", "i2v", ranks=2)
    folder = shapes.root / "i2v/video_64px"
    of_the_call = ["contact_sheet.png", "phases.json", "phases_rank1.json"]
    samples = ["one.mp4", "one.txt", "two.mp4", "two.txt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(of_the_call + samples)
    assert (folder / "one.txt").read_text(encoding="utf-8") == quoted + "\n"
    with av.open(str(folder / "one.mp4")) as container:
        assert container.metadata["title"] == quoted and container.streams.video[0].average_rate == 8
    for name in ("one", "two"):
        sampled = read_video(folder / f"{name}.mp4")
        assert sampled.shape == (9, 64, 64, 3)
        assert np.abs(sampled[0] - video[0]).mean() < 8 < np.abs(sampled[5] - video[5]).mean()


def test_averaged_weights_are_taken_if_asked_for(shapes, sample, monkeypatch):
    monkeypatch.chdir(shapes.root)
    torch.manual_seed(0)
    weights = build_model(MODEL, torch.float32, "cpu").state_dict()
    checkpoint = Path("outputs/averaged/epoch0-global_step1")
    (checkpoint / "model").mkdir(parents=True)
    shards = plan_shards(weights)
    for name, keys in shards:
        save_shard(checkpoint / "model" / name, {key: weights[key] for key in keys})
    (checkpoint / "model" / INDEX_NAME).write_text(format_index(weights, shards))
    averages = {name: torch.randn_like(weight) for name, weight in weights.items()}
    dcp.save(averages, checkpoint_id=checkpoint / "ema")
    (checkpoint / "running_states.json").write_text("{}")

    for use_ema, expected in ((False, weights), (True, averages)):
        arguments = ["--prompt", "a", "--model.from_pretrained", "outputs/averaged", "--use-ema", str(use_ema)]
        cfg = load_config(["sampling.py", *arguments], InferenceSettings)
        plan = make_plan(cfg)
        pipeline = Pipeline.from_config(cfg, plan.size, plan.weights, plan.lora, torch.device("cpu"))
        for name, parameter in pipeline.sampler.model.named_parameters():
            assert torch.equal(parameter, expected[name])


def test_prompts_over_the_token_limits_are_counted_before_models_load(shapes, monkeypatch, said):
    monkeypatch.chdir(shapes.root)
    (shapes.root / "sampling.py").write_text(CONFIG)
    prompts = ["a red circle", " ".join(["a red circle"] * 20), " ".join(["a blue square"] * 9)]
    limits = ["--t5.max_length", "40", "--clip.max_length", "8"]
    (shapes.root / "long.txt").write_text("\n".join(prompts))
    cfg = load_config(["sampling.py", "--dataset.data-path", "long.txt", *limits], InferenceSettings)
    tokenizers = [AutoTokenizer.from_pretrained(f"ckpts/shapes/{name}") for name in ("t5", "clip")]
    texts = {*(model_text(prompt, sample_size(cfg), 8, None) for prompt in prompts), ""}
    lengths = [[len(tokenizer(text).input_ids) for text in texts] for tokenizer in tokenizers]
    over = [sum(n > limit for n in of) for of, limit in zip(lengths, (40, 8), strict=True)]
    assert 0 < over[0] < 4 and 0 < over[1] < 4
    make_plan(cfg)
    for section, limit, number, of in (("t5", 40, over[0], lengths[0]), ("clip", 8, over[1], lengths[1])):
        expected = f"{number} of 4 texts have more than {section}.max_length={limit} tokens, the longest {max(of)}: "
        assert any(message.startswith(expected) for message in said)


def test_a_mistake_is_one_line_and_exit_code_1(sample):
    failed = sample("--prompt", "a", "--cond_type", "i2v_head", "--ref", "none.png", check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: ref none.png: file not found"
