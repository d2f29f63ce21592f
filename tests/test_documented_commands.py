"""The documented commands, word for word but for the widths: stage1 with the small world's encoders, on two ranks."""

import json
from pathlib import Path

import pytest

from opensora.checkpoint_folder import list_checkpoints

CONFIG = str(Path(__file__).parents[1] / "configs/diffusion/train/stage1.py")
SAMPLING = str(Path(__file__).parents[1] / "configs/diffusion/inference/256px.py")
WIDTHS = [
    *("--model.depth", "1", "--model.depth_single_blocks", "1", "--model.hidden-size", "48", "--model.num-heads", "2"),
    *("--model.axes-dim", "[8,8,8]", "--model.vec-in-dim", "64", "--model.context-in-dim", "64"),
    *("--ae", "dict(type='linear_causal', from_pretrained='ckpts/shapes/ae.safetensors')"),
    *("--t5", "dict(type='text_embedder', from_pretrained='ckpts/shapes/t5', max_length=32)"),
    *("--clip", "dict(type='text_embedder', from_pretrained='ckpts/shapes/clip', max_length=77)"),
]
SMALL = [*WIDTHS, "--bucket-config", "{'64px': {1: (1.0, 4), 5: (1.0, 2), 9: (1.0, 2)}}", "--num-workers", "1"]
TRAIN = ["scripts/diffusion/train.py", CONFIG, "--dataset.data-path", "datasets/shapes_nec.csv"]


@pytest.fixture(scope="module")
def experiment(shapes) -> Path:
    """A first run: 3 updates, a checkpoint after 2 and at the end."""
    options = ["--max-steps", "3", "--ckpt-every", "2", "--log-every", "1", "--exp-name", "your_experiment"]
    result = shapes.run(*TRAIN, *SMALL, *options, ranks=2)
    assert "step 3/3" in result.stdout
    return shapes.root / "outputs/your_experiment"


def test_train_leaves_the_documented_files(experiment):
    assert {"config.txt", "log.txt", "metrics.jsonl", "tensorboard"} <= {path.name for path in experiment.iterdir()}
    assert [path.name for path in list_checkpoints(experiment)] == ["epoch0-global_step2", "epoch0-global_step3"]
    newest = experiment / "epoch0-global_step3"
    assert (newest / "model/model.safetensors.index.json").is_file()
    assert json.loads((newest / "running_states.json").read_text())["global_step"] == 3
    assert json.loads((experiment / "config.txt").read_text())["model"]["hidden_size"] == 48
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    seconds = {"data", "encode", "forward_backward", "optimizer", "checkpoint", "eval"}
    for line in lines:
        assert {"step", "epoch", "loss", "grad_norm", "lr", "samples", "tokens", "seconds", "skipped", "clip"} == set(
            line
        )
        assert set(line["seconds"]) == seconds
    assert lines[2]["seconds"]["checkpoint"] > 0
    assert "step 3/3" in (experiment / "log.txt").read_text()


def test_tensorboard_has_the_losses_by_update(experiment):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(experiment / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in lines]


@pytest.mark.slow
def test_lr_and_wandb(shapes):
    options = ["--lr", "1e-5", "--wandb", "True", "--max-steps", "1", "--exp-name", "rated", "--warmup-steps", "None"]
    shapes.run(*TRAIN, *SMALL, *options, "--log-every", "1", ranks=1)
    run = shapes.root / "outputs/rated"
    assert json.loads((run / "metrics.jsonl").read_text())["lr"] == 1e-5
    assert list(run.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_load_given_several_folders_takes_the_newest_and_says_so(shapes, experiment):
    """The shell expands outputs/your_experiment/epoch*-global_step* before the script sees it."""
    given = [f"outputs/your_experiment/{path.name}" for path in list_checkpoints(experiment)]
    result = shapes.run(*TRAIN, *SMALL, "--load", *given, "--max-steps", "4", "--log-every", "1", ranks=2)
    assert "epoch0-global_step3, the newest of 2" in result.stdout
    assert "step 4/4" in result.stdout
    (run,) = [path for path in (shapes.root / "outputs").iterdir() if path.name.endswith("diffusion_train_stage1")]
    assert [path.name for path in list_checkpoints(run)] == ["epoch0-global_step4"]


def test_sample_from_the_checkpoints(shapes, experiment):
    given = [f"outputs/your_experiment/{path.name}" for path in list_checkpoints(experiment)]
    size = ["--resolution", "64px", "--aspect-ratio", "1:1", "--num-frames", "5", "--num-steps", "2"]
    model = [*WIDTHS, "--model.cond-embed", "False"]
    options = ["--save-dir", "samples", "--prompt", "raining, sea", "--model.from_pretrained", *given]
    shapes.run("scripts/diffusion/inference.py", SAMPLING, *options, *size, *model, ranks=1)
    assert [path.name for path in (shapes.root / "samples").rglob("*.mp4")]
