"""Ranks that share a model draw what one process draws."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shapes_world import REPOSITORY

from opensora.config import load_config
from opensora.inference.division import UNDIVIDED, Division
from opensora.inference.pipeline import Pipeline, Request
from opensora.inference.run import sample_all
from opensora.inference.settings import InferenceSettings, check_paths, require_available, validate
from opensora.inference.size import sample_size
from opensora.models.weights import build_model
from opensora.settings import parallel_sizes

SEQUENCE = "dict(tp_size=1,sp_size=2,enable_sequence_parallelism=True,sequence_parallelism_mode='{}',zero_stage=2)"
LAYOUTS = {
    "tensor": "dict(tp_size=2,sp_size=1,zero_stage=2)",
    "ring_attn": SEQUENCE.format("ring_attn"),
    "all_to_all": SEQUENCE.format("all_to_all"),
}
ALL = "dict(tp_size=2,sp_size=1)"  # ranks of an autoencoder


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    """Of a model that does something: initial weights give velocities of zero."""
    cfg = load_config([str(REPOSITORY / "configs/diffusion/inference/shapes.py"), "--prompt", "a"], InferenceSettings)
    model = build_model({**cfg.model, "from_pretrained": None}, torch.float32, "cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def arguments(weights, *more: str) -> list[str]:
    config = str(REPOSITORY / "configs/diffusion/inference/shapes.py")
    fixed = ["--model.from_pretrained", str(weights), "--use-ema", "False", "--num_steps", "3"]
    return [config, *fixed, "--sampling_option.num_frames", "5", *more]


def prepare(context, root, argv):
    os.chdir(root)
    cfg = load_config(argv, InferenceSettings)
    validate(cfg, context.world_size)
    require_available(cfg)
    check_paths(cfg)
    return cfg


def frames(context, root, argv):
    """Latents and frames of two requests, drawn together."""
    cfg = prepare(context, root, argv)
    sizes = parallel_sizes(cfg)
    context = context.share_samples(sizes.tensor, sizes.sequence)
    division = Division.of(cfg, context) if context.model.size > 1 else UNDIVIDED
    weights = Path(cfg.model.from_pretrained)
    pipeline = Pipeline.from_config(cfg, sample_size(cfg), weights, None, context.device, division=division)
    requests = [Request("a red circle.", seed=3), Request("a blue square.", seed=4)]
    return pipeline.sample_latents(requests), pipeline(requests)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_one_process(one_rank, two_ranks, shapes, weights, layout):
    (expected,) = one_rank(frames, shapes.root, arguments(weights, "--prompt", "a"))
    plugins = ["--plugin", "hybrid", "--plugin_config", LAYOUTS[layout]]
    plugins += ["--plugin_ae", "hybrid", "--plugin_config_ae", ALL]
    for latents, videos in two_ranks(frames, shapes.root, arguments(weights, "--prompt", "a", *plugins)):
        torch.testing.assert_close(latents, expected[0], atol=1e-4, rtol=1e-4)
        for video, other in zip(videos, expected[1], strict=True):
            assert (video.int() - other.int()).abs().max() <= 1


def sample(context, root, argv):
    sample_all(prepare(context, root, argv), context)


def test_a_list_is_shared_by_pairs_of_ranks(four_ranks, shapes, weights, tmp_path):
    prompts = ["a red circle", "a blue square", "a green triangle"]
    (tmp_path / "list.txt").write_text("\n".join(prompts))
    more = ["--dataset.data-path", str(tmp_path / "list.txt"), "--save-dir", str(tmp_path / "samples")]
    more += ["--plugin", "hybrid", "--plugin_config", LAYOUTS["tensor"]]
    four_ranks(sample, shapes.root, arguments(weights, *more))
    videos = sorted(path.name for path in (tmp_path / "samples" / "video_64px").glob("*.mp4"))
    assert len(videos) == 3
