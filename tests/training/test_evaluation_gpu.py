"""Evaluations on a CUDA device; run by `make test-gpu`."""

import json

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_training_does_not_notice_on_a_gpu(shapes, tmp_path, compiled):
    run = ["--outputs", str(tmp_path), "--max-steps", "8", "--ckpt-every", "0", "--ema-decay", "0.9", "--dtype", "bf16"]
    run += ["--model.compile", compiled]
    evaluate = ["--eval-every", "2", "--eval-prompts", "a red circle", "--eval-option.num-steps", "3"]
    for name, more in (("plain", []), ("evaluated", evaluate)):
        shapes.run("scripts/diffusion/train.py", *shapes.train_arguments(*run, "--exp-name", name, *more), ranks=1)
    plain, evaluated = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "evaluated")
    )
    assert [(a["loss"], a["grad_norm"]) for a in plain] == [(b["loss"], b["grad_norm"]) for b in evaluated]
    assert len((tmp_path / "evaluated/eval.jsonl").read_text().splitlines()) == 4
