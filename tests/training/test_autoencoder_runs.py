"""Runs with the autoencoders of the 11B configs, small: training with given frames, and a sample of the result."""

import json

import pytest
from safetensors.torch import save_file
from shapes_world import REPOSITORY, SMALL_MODEL

from opensora.models.autoencoder import Autoencoder2D, HunyuanVAE

HUNYUAN = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32}
FLUX = {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1}
CASES = [("hunyuan_vae", HunyuanVAE, {**HUNYUAN, "use_spatial_tiling": True}), ("autoencoder_2d", Autoencoder2D, FLUX)]


@pytest.mark.slow
@pytest.mark.parametrize("name, component, settings", CASES)
def test_training_and_sampling(name, component, settings, shapes):
    weights = f"ckpts/{name}.safetensors"
    save_file(component(**settings).vae.state_dict(), shapes.root / weights)
    ae = str({"type": name, "from_pretrained": weights, **settings})
    common = ("--ae", ae, "--dtype", "bf16")
    conditions = "{'t2v': 1, 'i2v_head': 2, 'i2v_tail': 2, 'i2v_loop': 2}"
    few = ("--max-steps", "2", "--ckpt-every", "2", "--exp-name", name, "--condition-config", conditions)
    shapes.run("scripts/diffusion/train.py", *shapes.train_arguments(*common, *few), ranks=1)
    records = [json.loads(line) for line in (shapes.root / "outputs" / name / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2] and all(0 < record["loss"] < 10 for record in records)

    config = str(REPOSITORY / "configs/diffusion/inference/shapes.py")
    sampling = ("--prompt", "a disc", "--sampling-option.num-steps", "2", "--use-ema", "False", "--save-dir", name)
    weights = ("--model.from-pretrained", f"outputs/{name}")
    shapes.run("scripts/diffusion/inference.py", config, *common, *SMALL_MODEL, *weights, *sampling)
    assert list((shapes.root / name).rglob("*.mp4"))
