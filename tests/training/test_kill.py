"""Processes that are killed, and the run that goes on."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from opensora.checkpoint_folder import list_checkpoints
from opensora.models.weight_files import open_weights

STEPS = 8


def arguments(shapes, outputs: Path, name: str, *more: str) -> list[str]:
    settings = ["--outputs", str(outputs), "--exp-name", name, "--max-steps", str(STEPS), "--ckpt-every", "1"]
    return shapes.train_arguments(*settings, "--num-workers", "2", "--ema-decay", "0.9", *more)


def losses(run: Path) -> list[tuple]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    source = open_weights(list_checkpoints(run)[-1])
    return source.read(list(source.shapes))


def children(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started."""
    direct = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("undisturbed")
    shapes.run("scripts/diffusion/train.py", *arguments(shapes, outputs, "whole"), ranks=2)
    return outputs / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["during a save", "during a save in the background", "at a random moment"])
def test_kill_9_and_resume(shapes, undisturbed, tmp_path, moment):
    """The launcher is killed: its ranks end with it, and the newest whole checkpoint continues to the same end."""
    run, background = tmp_path / "run", ["--async-io", str("background" in moment)]
    process = shapes.start("scripts/diffusion/train.py", *arguments(shapes, tmp_path, "run", *background), ranks=2)
    if moment != "at a random moment":
        wait_until(lambda: list_checkpoints(run) and any(run.glob(".tmp-epoch*")))
    else:
        wait_until(lambda: list_checkpoints(run))
        time.sleep(random.uniform(0, 1))
    ranks = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not any(map(alive, ranks)), seconds=240)
    found = list_checkpoints(run)
    assert found
    shapes.run("scripts/diffusion/train.py", *arguments(shapes, tmp_path, "run", "--load", str(run)), ranks=2)
    assert not list(run.glob(".tmp-*"))
    assert losses(run) == losses(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_one_rank_that_dies_ends_all(shapes, tmp_path):
    process = shapes.start("scripts/diffusion/train.py", *arguments(shapes, tmp_path, "run"), ranks=2)
    wait_until(lambda: list_checkpoints(tmp_path / "run"))
    everyone = children(process.pid)
    victim = next(pid for pid in everyone if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(victim, signal.SIGKILL)
    assert process.wait(240) != 0
    process.communicate()
    wait_until(lambda: not any(map(alive, everyone)), seconds=240)


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_older_checkpoint(shapes, tmp_path):
    """A file size limit stands in for a full disk: the write fails in the middle, on each rank, for real."""
    limit = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18));"
    script = tmp_path / "limited.py"
    script.write_text(
        f"{limit} import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    first = arguments(shapes, tmp_path, "run", "--max-steps", "1")
    shapes.run("scripts/diffusion/train.py", *first, ranks=2)
    train = str(Path(__file__).parents[2] / "scripts/diffusion/train.py")
    again = arguments(shapes, tmp_path, "run", "--load", str(tmp_path / "run"))
    result = shapes.run(str(script), train, *again, ranks=2, check=False)
    assert result.returncode != 0
    assert "saving" in result.stderr and "the checkpoints before it are intact" in result.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["epoch0-global_step1"]


@pytest.mark.slow
def test_a_loader_worker_that_dies_is_one_line_and_the_end_of_all(shapes, tmp_path):
    """Of rank 1, in the middle of the run, as the kernel does when memory runs out."""
    process = shapes.start("scripts/diffusion/train.py", *arguments(shapes, tmp_path, "run"), ranks=2)
    wait_until(lambda: list_checkpoints(tmp_path / "run"))
    everyone = children(process.pid)
    rank = next(pid for pid in everyone if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(next(pid for pid in children(rank) if children(pid)), signal.SIGKILL)  # the one that has one that decodes
    out, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    lines = [line for line in out.splitlines() if "a worker process of the data loader died (SIGKILL)" in line]
    assert len(lines) == 1 and "error: rank 1: " in lines[0] and "--num-workers (now 2)" in lines[0]
    wait_until(lambda: not any(map(alive, everyone)), seconds=240)
