"""The same path on a CUDA device; run by `make test-gpu`."""

import json

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_trains_resumes_and_samples(shapes, tmp_path, dtype):
    run = [
        "--outputs",
        str(tmp_path),
        "--exp-name",
        "run",
        "--dtype",
        dtype,
        "--ckpt-every",
        "10",
        "--ema-decay",
        "0.9",
    ]
    train = "scripts/diffusion/train.py"
    shapes.run(train, *shapes.train_arguments(*run, "--max-steps", "20"), ranks=1)
    shapes.run(train, *shapes.train_arguments(*run, "--max-steps", "30", "--load", str(tmp_path / "run")), ranks=1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
