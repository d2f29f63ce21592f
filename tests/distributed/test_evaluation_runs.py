"""Evaluations while training: what they find is right, and training does not notice them."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_end, metrics, numbers, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora.checkpoint_folder import list_checkpoints
from opensora.config import load_config
from opensora.data.transforms import normalise
from opensora.data.video import read_clip
from opensora.diffusion.random import derive_seed
from opensora.models.frozen import build_frozen
from opensora.models.weight_files import open_averages
from opensora.models.weights import build_model
from opensora.registry import AUTOENCODERS, TEXT_ENCODERS
from opensora.training.settings import TrainSettings

PROMPTS = ["a red circle moving right", "a blue square, moving left", "a green circle"]
COMMON = ["--num-workers", "0", "--ckpt-every", "0", "--ema-decay", "0.9", "--max-steps", "4"]
EVALUATE = ["--eval-every", "2", "--eval-prompts", *PROMPTS, "--eval-option.num-steps", "2"]
EVALUATE += ["--eval-option.aspect-ratio", "1:1", "--eval-samples", "3", "--eval-times", "[0.2,0.8]"]


def evaluations(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        ["--dtype", "bf16", "--plugin_config", "{'overlap_allgather': True}"],
        pytest.param(["--dtype", "fp32", "--plugin", "zero1", "--accumulation-steps", "2"], marks=pytest.mark.slow),
        pytest.param(
            ["--dtype", "bf16", "--plugin", "hybrid", "--plugin_config", "{'tp_size': 2, 'zero_stage': 1}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bf16 zero2", "fp32 zero1", "bf16 tensor parallel"],
)
def test_training_does_not_notice(two_ranks, shapes, tmp_path, settings):
    common = [*COMMON, *settings, "--outputs", str(tmp_path)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "plain"))
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *EVALUATE, "--exp-name", "evaluated"))
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    assert numbers(evaluated) == numbers(plain)
    assert_same_end(evaluated, plain)
    for rank in range(2):
        states = [torch.load(list_checkpoints(run)[-1] / f"rng/rank{rank}.pt") for run in (plain, evaluated)]
        assert str(states[0]) == str(states[1]) and torch.equal(states[0]["torch"], states[1]["torch"])
    assert [line["step"] for line in evaluations(evaluated)] == [2, 4]
    assert [line["seconds"]["eval"] > 0 for line in metrics(evaluated)] == [False, False, True, False]
    assert not (plain / "eval.jsonl").exists() and not (plain / "eval").exists()


def test_samples_are_those_of_inference_with_the_averaged_weights(two_ranks, shapes, tmp_path):
    run, prompts = tmp_path / "run", tmp_path / "list.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = [*COMMON, *EVALUATE, "--dtype", "fp32", "--outputs", str(tmp_path), "--exp-name", "run"]
    arguments += ["--eval-samples", "0", "--eval-prompts", str(prompts), "--eval-option.num-frames", "1"]
    arguments += ["--lr", "0.02", "--warmup-steps", "0"]  # so that two updates are seen
    two_ranks(train, shapes.root, shapes.train_arguments(*arguments))
    config = tmp_path / "sampling.py"
    settings = json.loads((run / "config.txt").read_text())
    parts = {key: settings[key] for key in ("model", "ae", "t5", "clip")}
    parts["model"] = {key: value for key, value in parts["model"].items() if not key.startswith("grad_ckpt")}
    option = {"resolution": "64px", "aspect_ratio": "1:1", "num_frames": 1, "num_steps": 2}
    config.write_text("\n".join(f"{key} = {value!r}" for key, value in parts.items()))
    with open(config, "a") as file:
        file.write(f"\ndtype = 'fp32'\nfps_save = 12\nuse_ema = True\nsampling_option = {option}\n")
    where = ["--save-dir", str(tmp_path / "samples"), "--model.from_pretrained", str(run)]
    shapes.run("scripts/diffusion/inference.py", str(config), "--dataset.data-path", str(prompts), *where)
    for name in (f"list_{i:04d}.png" for i in range(len(PROMPTS))):
        first, last = (pixels(run / f"eval/step000000{step}" / name) for step in (2, 4))
        # there the texts are embedded in one batch, which rounds in another way
        assert np.abs(last - pixels(tmp_path / "samples/image_64px" / name)).max() <= 1
        assert np.abs(last - first).max() > 1
    assert [len(line["samples"]) for line in evaluations(run)] == [3, 3] and "loss" not in evaluations(run)[0]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def held_out_table(shapes, tmp_path, rows):
    """The last rows of the table that are videos, as a table of its own."""
    with open(shapes.root / shapes.table, newline="") as file:
        found = [row for row in csv.DictReader(file) if int(row["num_frames"]) >= 9][-rows:]
    path = tmp_path / "held_out.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    return path, found


def naive_loss(cfg, weights, row, index, time):
    """The loss of one sample, formula by formula."""
    model = build_model({**cfg.model, "from_pretrained": None}, torch.float32, "cpu").eval()
    model.load_state_dict(weights)
    ae = build_frozen(AUTOENCODERS, cfg.ae, "ae", torch.float32, "cpu")
    t5, clip = (build_frozen(TEXT_ENCODERS, cfg[name], name, torch.float32, "cpu") for name in ("t5", "clip"))
    assert int(row["num_frames"]) == 9  # there is one place where the clip may begin
    video = normalise(read_clip(row["path"], np.arange(9), 64, 64, "fast"), torch.float32)
    data = ae.encode(video[None])[0]  # this autoencoder draws no noise
    channels, t, h, w = data.shape
    generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "held out", index))
    torch.randn((), generator=generator)  # the time that training would draw
    noise = torch.randn(data.shape, generator=generator)
    x = (1 - time) * data + (1 - (1 - 1e-5) * (1 - time)) * noise

    def patches(z):
        z = z.reshape(channels, t, h // 2, 2, w // 2, 2).permute(1, 2, 4, 0, 3, 5)
        return z.reshape(1, -1, channels * 4)

    text = t5([row["text"]])
    prediction = model(
        img=patches(x),
        img_ids=torch.cartesian_prod(*(torch.arange(n).float() for n in (t, h // 2, w // 2)))[None],
        txt=text,
        txt_ids=torch.zeros(1, text.shape[1], 3),
        timesteps=torch.tensor([time]),
        y_vec=clip([row["text"]]),
        cond=torch.zeros(1, t * h * w // 4, channels * 4 + 4),
    )
    return float(((prediction - patches((1 - 1e-5) * noise - data)) ** 2).mean())


SEQUENCE = {"sp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all"}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        ("one_rank", []),
        ("two_ranks", []),
        ("two_ranks", ["--plugin", "hybrid", "--plugin_config", str({"zero_stage": 2, **SEQUENCE})]),
    ],
    ids=["one rank", "two ranks", "sequence parallel"],
)
def test_the_loss_of_held_out_samples(request, shapes, tmp_path, monkeypatch, ranks, settings):
    monkeypatch.chdir(shapes.root)
    table, rows = held_out_table(shapes, tmp_path, 3)
    arguments = [*COMMON, "--dtype", "fp32", "--outputs", str(tmp_path), "--exp-name", "run", "--eval-every", "4"]
    arguments += ["--eval-data-path", str(table), "--eval-times", "[0.25,0.75]", "--condition_config", "{'t2v': 1}"]
    arguments += [*settings, "--dataset.fps-max", "none"]  # captions don't tell the rate
    arguments = shapes.train_arguments(*arguments)
    request.getfixturevalue(ranks)(train, shapes.root, arguments)
    (found,) = evaluations(tmp_path / "run")
    assert found["samples"] == [] and list(found["by_clip"]) == ["64px/9"] and found["averaged"]

    cfg = load_config(arguments, TrainSettings)
    source = open_averages(list_checkpoints(tmp_path / "run")[-1])
    weights = source.read(list(source.shapes))
    with torch.no_grad():
        losses = {
            time: [naive_loss(cfg, weights, row, index, float(time)) for index, row in enumerate(rows)]
            for time in ("0.25", "0.75")
        }
    assert found["loss"] == pytest.approx(np.mean(list(losses.values())), rel=1e-5)
    assert found["by_time"] == pytest.approx({time: np.mean(each) for time, each in losses.items()}, rel=1e-5)
    assert found["by_clip"]["64px/9"] == found["loss"]


def test_a_resumed_run_makes_up_for_the_evaluation_that_is_missing(two_ranks, shapes, tmp_path):
    run = tmp_path / "run"
    common = [*COMMON, *EVALUATE, "--outputs", str(tmp_path), "--exp-name", "run", "--eval-prompts", PROMPTS[0]]
    common = shapes.train_arguments(*common, "--ckpt-every", "2")
    blocked = run / "eval/step0000004"  # a file where a folder should be: its samples can't be written
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    two_ranks(train, shapes.root, common)
    first, last = evaluations(run)
    assert [len(line["samples"]) for line in (first, last)] == [1, 0]

    blocked.unlink()
    (run / "eval.jsonl").write_text(json.dumps(last) + "\n")
    two_ranks(train, shapes.root, [*common, "--load", str(run / "epoch0-global_step2")])
    assert [(line["step"], line["loss"], len(line["samples"])) for line in evaluations(run)] == [
        (2, first["loss"], 1),
        (4, last["loss"], 1),
    ]

    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0}).Reload()
    gifs = events.Images("eval/prompt_0000")
    assert {gif.step for gif in gifs} == {2, 4} and gifs[0].encoded_image_string.startswith(b"GIF89a")
