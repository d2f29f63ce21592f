"""A resumed run equals the run that was never stopped: bitwise, with every kind of place to stop at."""

import time
from pathlib import Path

import pytest
from runs import assert_same_end, metrics, numbers, train

from opensora.checkpoint_folder import list_checkpoints
from opensora.checkpoint_manifest import problems
from opensora.training import checkpoint, trainer
from opensora.training.callbacks import Callback
from opensora.training.file_writer import write_files

EMA = ["--ema-decay", "0.9"]


@pytest.mark.parametrize(
    ("name", "stop", "end", "settings"),
    [
        ("two data workers, bf16", 3, 6, ["--num-workers", "2", "--dtype", "bf16"]),
        pytest.param(
            *("accumulation, fp32", 2, 5, ["--accumulation-steps", "2", "--dtype", "fp32", "--num-workers", "0"]),
            marks=pytest.mark.slow,
        ),
        ("zero1, saved in the background", 1, 3, ["--plugin", "zero1", "--num-workers", "0", "--async-io", "True"]),
    ],
)
def test_resume_is_exact(two_ranks, shapes, tmp_path, name, stop, end, settings):
    common = [*settings, *EMA, "--outputs", str(tmp_path), "--ckpt-every", str(stop), "--warmup-steps", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "whole", "--max-steps", str(end)))
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "parts", "--max-steps", str(stop)))
    resume = ["--exp-name", "parts", "--max-steps", str(end), "--load", str(parts)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *resume))
    assert numbers(parts) == numbers(whole)
    assert [line["step"] for line in metrics(parts)] == list(range(1, end + 1))
    assert_same_end(parts, whole)


def few_rows(shapes, rows: int) -> str:
    lines = (shapes.root / shapes.table).read_text().splitlines(keepends=True)
    table = shapes.root / f"datasets/few_{rows}.csv"
    table.write_text("".join(lines[: rows + 1]))
    return str(table)


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_across_the_end_of_an_epoch(two_ranks, shapes, tmp_path, stop):
    """24 clips make 3 updates of 2 x 4: `stop` is at an epoch's last update, and at the first of the next one."""
    common = ["--dataset.data-path", few_rows(shapes, 24), *EMA, "--outputs", str(tmp_path), "--num-workers", "1"]
    common += ["--ckpt-every", str(stop), "--dtype", "bf16"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "whole", "--max-steps", "7"))
    assert [line["epoch"] for line in metrics(whole)] == [0, 0, 0, 1, 1, 1, 2]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "parts", "--max-steps", str(stop)))
    resume = ["--exp-name", "parts", "--max-steps", "7", "--load", str(parts)]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *resume))
    assert numbers(parts) == numbers(whole)
    assert_same_end(parts, whole)


def test_two_ranks_equal_one_rank_with_accumulation(one_rank, two_ranks, shapes, tmp_path):
    """The same micro-batches, so the same losses and gradients; ranks and order of summation differ."""
    common = [
        "--outputs",
        str(tmp_path),
        "--max-steps",
        "3",
        "--dtype",
        "fp32",
        "--num-workers",
        "0",
        "--ckpt-every",
        "0",
    ]
    two = shapes.train_arguments(*common, "--exp-name", "two")
    one = shapes.train_arguments(*common, "--exp-name", "one", "--accumulation-steps", "2")
    two_ranks(train, shapes.root, two)
    one_rank(train, shapes.root, one)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert (a["samples"], a["tokens"], a["epoch"]) == (b["samples"], b["tokens"], b["epoch"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_checkpoint_of_two_ranks_goes_on_with_one(one_rank, two_ranks, shapes, tmp_path):
    """Optimizer, averages and the place in the data do not depend on the number of ranks that wrote them."""
    common = ["--outputs", str(tmp_path), "--dtype", "fp32", "--num-workers", "0", "--ckpt-every", "2", *EMA]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "two", "--max-steps", "4"))
    resume = ["--exp-name", "one", "--max-steps", "4", "--load", str(tmp_path / "two/epoch0-global_step2")]
    one_rank(train, shapes.root, shapes.train_arguments(*common, *resume, "--accumulation-steps", "2"))
    two, one = metrics(tmp_path / "two")[2:], metrics(tmp_path / "one")
    assert [line["step"] for line in one] == [3, 4]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_start_step_and_start_epoch_start_the_data_anew(two_ranks, shapes, tmp_path):
    common = ["--dataset.data-path", few_rows(shapes, 24), "--outputs", str(tmp_path), "--num-workers", "0"]
    common += ["--warmup-steps", "10", "--ckpt-every", "2"]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", "first", "--max-steps", "2"))
    again = ["--exp-name", "again", "--load", str(tmp_path / "first"), "--start-step", "0", "--start-epoch", "0"]
    two_ranks(train, shapes.root, shapes.train_arguments(*common, *again, "--max-steps", "6"))
    lines = metrics(tmp_path / "again")
    assert [line["step"] for line in lines] == [3, 4, 5, 6]  # updates go on counting
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1]  # all 3 updates of epoch 0 are done again
    rates = [line["lr"] for line in metrics(tmp_path / "first") + lines]
    assert rates == sorted(rates) and len(set(rates)) == 6  # the warm-up goes on where it was


def test_only_the_newest_checkpoints_are_kept(two_ranks, shapes, tmp_path):
    arguments = ["--outputs", str(tmp_path), "--exp-name", "run", "--max-steps", "4", "--ckpt-every", "1"]
    two_ranks(train, shapes.root, shapes.train_arguments(*arguments, "--keep-n-latest", "2", "--num-workers", "0"))
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir() and path.name != "tensorboard")
    assert left == ["epoch0-global_step3", "epoch0-global_step4"]


def test_bad_files_do_not_change_the_batches(two_ranks, shapes, tmp_path):
    """Truncated, missing and one-frame files among good ones: trained to the end, replaced, written down."""
    header, *rows = Path(few_rows(shapes, 32)).read_text().splitlines()
    first_file = shapes.root / rows[0].split(",")[0]
    broken = tmp_path / "truncated.mp4"
    broken.write_bytes(first_file.read_bytes()[: first_file.stat().st_size // 2])
    one_frame = sorted((shapes.root / "datasets/shapes").glob("*.png"))[0]
    for i, path in enumerate([broken, tmp_path / "missing.mp4", one_frame]):
        rows[i] = ",".join([str(path), *rows[i].split(",")[1:]])
    table = tmp_path / "table.csv"
    table.write_text("\n".join([header, *rows]) + "\n")
    arguments = ["--dataset.data-path", str(table), "--outputs", str(tmp_path), "--exp-name", "run", "--epochs", "2"]
    two_ranks(train, shapes.root, shapes.train_arguments(*arguments, "--num-workers", "1", "--ckpt-every", "0"))
    lines = metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    assert {(line["samples"], line["tokens"]) for line in lines} == {(8, lines[0]["tokens"])}
    rejected = (tmp_path / "run/rejected.jsonl").read_text()
    assert all(name in rejected for name in ("truncated.mp4", "missing.mp4", one_frame.name))


def load_into_another_run(context, root, arguments):
    try:
        train(context, root, arguments)
    except ValueError as error:
        return str(error)


def test_a_checkpoint_of_another_run_does_not_continue_a_folder(two_ranks, shapes, tmp_path):
    common = ["--outputs", str(tmp_path), "--max-steps", "1", "--num-workers", "0"]
    for name in ("first", "second"):
        two_ranks(train, shapes.root, shapes.train_arguments(*common, "--exp-name", name))
    before = numbers(tmp_path / "second")
    load = ["--load", str(tmp_path / "first"), "--exp-name", "second"]
    for message in two_ranks(load_into_another_run, shapes.root, shapes.train_arguments(*common, *load)):
        assert "already holds checkpoints" in message
    assert numbers(tmp_path / "second") == before


def test_a_run_goes_on_from_an_older_checkpoint_of_its_own(one_rank, shapes, tmp_path):
    run = tmp_path / "run"
    common = [
        "--outputs",
        str(tmp_path),
        "--exp-name",
        "run",
        "--num-workers",
        "0",
        "--ckpt-every",
        "1",
        "--keep-n-latest",
        "3",
    ]
    one_rank(train, shapes.root, shapes.train_arguments(*common, "--max-steps", "3"))
    older = ["--load", str(run / "epoch0-global_step1"), "--max-steps", "2"]
    one_rank(train, shapes.root, shapes.train_arguments(*common, *older))
    assert [path.name for path in list_checkpoints(run)] == ["epoch0-global_step1", "epoch0-global_step2"]
    assert len(list(run.glob("abandoned-*"))) == 2
    assert [line["step"] for line in metrics(run)] == [1, 2]


class CannotClose(Callback):
    def close(self) -> None:
        raise OSError("No space left on device")


def train_with_a_log_that_cannot_close(context, root: Path, arguments: list[str]) -> str:
    """The error of a run whose last save takes a second, in the background."""

    def write_slowly(*arguments):
        time.sleep(1)
        return write_files(*arguments)

    build, choose = trainer.Trainer._build_callbacks, checkpoint.choose_writer
    trainer.Trainer._build_callbacks = lambda self: [CannotClose(), *build(self)]
    checkpoint.choose_writer = lambda _: write_slowly
    try:
        train(context, root, arguments)
    except OSError as error:
        return str(error)
    finally:
        trainer.Trainer._build_callbacks, checkpoint.choose_writer = build, choose
    return ""


def test_a_log_that_cannot_be_closed_costs_no_save(one_rank, shapes, tmp_path):
    arguments = shapes.train_arguments(*("--outputs", str(tmp_path), "--exp-name", "run", "--async-io", "True"))
    arguments += ["--max-steps", "1", "--num-workers", "0"]
    assert one_rank(train_with_a_log_that_cannot_close, shapes.root, arguments) == ["No space left on device"]
    assert [problems(folder) for folder in list_checkpoints(tmp_path / "run")] == [[]]
    one_rank(
        train, shapes.root, [*arguments, "--max-steps", "2", "--load", str(tmp_path / "run")]
    )  # its folder is free
