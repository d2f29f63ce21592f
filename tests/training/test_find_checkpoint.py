"""Which checkpoints a config can go on from."""

import json

import pytest
from mmengine import Config

from opensora.training.trainer import find_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "epoch0-global_step2"
    (folder / "model").mkdir(parents=True)
    (folder / "running_states.json").write_text("{}")
    (folder / "config.txt").write_text(json.dumps({"model": {"fused_qkv": False, "use_liger_rope": True}}))
    return folder


def config(checkpoint, **model):
    settings = {"load": str(checkpoint), "verify_checkpoint": True, "lora_config": None, "model": model}
    return Config(settings)


def test_the_same_layout_is_resumed(checkpoint):
    assert find_checkpoint(config(checkpoint, fused_qkv=False, use_liger_rope=True)) == checkpoint


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({"fused_qkv": False}, "model.use_liger_rope=False, but .* with True: set it so, or start from its weights"),
        ({"use_liger_rope": True}, "model.fused_qkv=True, but"),
    ],
)
def test_another_layout_is_not_resumed(checkpoint, model, complaint):
    with pytest.raises(ValueError, match=complaint):
        find_checkpoint(config(checkpoint, **model))
