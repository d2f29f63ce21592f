"""Training that does nothing changes nothing."""

import numpy as np
import pytest
import torch
from runs import train
from shapes_world import REPOSITORY, SMALL_MODEL
from video_files import decode_all

from opensora.common import to_torch_dtype
from opensora.config import load_config
from opensora.models.weight_files import save_shard
from opensora.models.weights import build_model
from opensora.training.settings import TrainSettings


@pytest.mark.slow
def test_zero_updates_then_sampling_equals_sampling_from_the_initial_weights(one_rank, shapes, tmp_path):
    arguments = shapes.train_arguments("--outputs", str(tmp_path), "--exp-name", "run", "--max-steps", "0")
    one_rank(train, shapes.root, arguments)
    cfg = load_config(arguments, TrainSettings)
    torch.manual_seed(cfg.seed)
    save_shard(tmp_path / "initial.safetensors", build_model(cfg.model, to_torch_dtype(cfg.dtype), "cpu").state_dict())
    videos = []
    for name, weights in (("trained", "run"), ("initial", "initial.safetensors")):
        config = str(REPOSITORY / "configs/diffusion/inference/shapes.py")
        # --crf 0: x264 may choose other bits for the same pixels, but these it keeps
        options = ["--save-dir", str(tmp_path / name), "--prompt", "a red circle", "--num-steps", "3", "--crf", "0"]
        options += ["--model.from-pretrained", str(tmp_path / weights), "--use-ema", "False", *SMALL_MODEL]
        shapes.run("scripts/diffusion/inference.py", config, *options)
        (video,) = (tmp_path / name).rglob("*.mp4")
        videos.append(decode_all(video))
    assert np.array_equal(*videos)
