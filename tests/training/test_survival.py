"""Runs that are asked to save or to stop, that hang, that run out of memory: real processes, real signals."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from shapes_world import REPOSITORY

from opensora.checkpoint_folder import list_checkpoints, parse_folder_name
from opensora.training.memory import read_shrunk, shrink_buckets

TRAIN = "scripts/diffusion/train.py"


def arguments(shapes, outputs: Path, *more: str) -> list[str]:
    settings = ["--outputs", str(outputs), "--exp-name", "run", "--ckpt-every", "0", "--num-workers", "1"]
    return shapes.train_arguments(*settings, *more)


def steps(run: Path) -> list[int]:
    """The updates in metrics.jsonl, which may end in half a line."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def saved(run: Path) -> list[int]:
    return [parse_folder_name(path)[1] for path in list_checkpoints(run)]


def wait_until(condition, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "".join(process.communicate())[-3000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def rank_of(launcher: int, rank: int) -> int:
    """The process that torchrun started as a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    name = f"RANK={rank}".encode()
    return next(int(pid) for pid in children if name in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_signals_and_files_save_and_stop(shapes, tmp_path):
    """SIGUSR1 to one rank and the file `save` save, and it goes on; SIGTERM to one rank ends all, saved, with 0."""
    run = tmp_path / "run"
    process = shapes.start(TRAIN, *arguments(shapes, tmp_path), ranks=2)
    wait_until(lambda: steps(run), process)
    rank = rank_of(process.pid, 1)
    os.kill(rank, signal.SIGUSR1)
    wait_until(lambda: len(saved(run)) == 1, process)
    (run / "save").touch()
    wait_until(lambda: len(saved(run)) == 2, process)
    wait_until(lambda: steps(run)[-1] > saved(run)[-1], process)
    assert not (run / "save").exists()
    os.kill(rank, signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert saved(run)[-1] == steps(run)[-1]
    assert "asked to stop" in out and "stopping after" in out


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(shapes, tmp_path):
    """Ctrl-C reaches torchrun, which hands it on to the groups of its ranks; then auto_resume and the file `stop`."""
    run = tmp_path / "run"
    command = arguments(shapes, tmp_path, "--auto-resume", "True")
    process = shapes.start(TRAIN, *command, ranks=2)
    wait_until(lambda: steps(run), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0  # torchrun's own
    assert "Traceback" not in out and "DataLoader" not in err
    first = steps(run)[-1]
    assert saved(run) == [first]
    (run / "stop").touch()
    result = shapes.run(TRAIN, *command, ranks=2)
    assert f"epoch0-global_step{first}" in result.stdout
    assert not (run / "stop").exists()
    assert steps(run) == list(range(1, first + 2)) and saved(run) == [first, first + 1]


def test_a_smaller_batch_is_noted_once_and_applied(tmp_path):
    notes = [("64px", 9, 8, 0), ("64px", 9, 4, 1), ("64px", 5, 2, 0)]
    keys = ("resolution", "num_frames", "batch_size", "rank")
    lines = [json.dumps(dict(zip(keys, note, strict=True)) | {"update": 3}) for note in notes]
    (tmp_path / "shrunk_buckets.jsonl").write_text("\n".join(lines) + "\n")
    config = {"64px": {9: (1.0, 16), 5: (0.5, 2), 1: (1.0, 6)}}
    shrink_buckets(config, read_shrunk(tmp_path))
    assert config == {"64px": {9: (1.0, 4), 5: (0.5, 2), 1: (1.0, 6)}}
    assert read_shrunk(tmp_path / "none") == {}


LIMITED = """
import resource, sys
from pathlib import Path
from opensora.training.callbacks import Callback
from opensora.training.trainer import Trainer

class Limit(Callback):
    def on_start(self, trainer):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + {spare}, used + {spare}))

build = Trainer._build_callbacks
Trainer._build_callbacks = lambda self: [*build(self), Limit()]
sys.argv[0] = "{train}"
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_out_of_memory_shrinks_the_bucket_and_goes_on(shapes, tmp_path):
    """The address space is limited for real: a batch of 96 clips does not fit, and torchrun starts again with fewer."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(spare=400 * 2**20, train=REPOSITORY / TRAIN))
    arguments = ["--outputs", str(tmp_path), "--exp-name", "run", "--auto-resume", "True", "--oom-policy", "shrink"]
    arguments += ["--bucket-config", "{'64px': {9: (1.0, 96)}}", "--num-workers", "0", "--max-steps", "2"]
    result = shapes.run(str(script), *shapes.train_arguments(*arguments), ranks=1, restarts=6, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "bucket 64px/9/" in result.stdout and "its batch size is 96, and 48 from the next start on" in result.stdout
    assert steps(tmp_path / "run") == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["samples"] == read_shrunk(tmp_path / "run")["64px", 9] < 96


@pytest.mark.slow
def test_a_rank_that_waits_too_long_says_where_and_ends_all(shapes, tmp_path):
    """One rank is stopped (SIGSTOP): the other waits for it, says where, dumps its stacks and ends."""
    run = tmp_path / "run"
    settings = ["--dist-timeout", "8", "--dataset.read-timeout", "3"]
    process = shapes.start(TRAIN, *arguments(shapes, tmp_path, *settings), ranks=2)
    wait_until(lambda: steps(run) and steps(run)[-1] > 20, process)
    stopped = rank_of(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    wait_until((run / "stuck-rank0.txt").exists, process)
    time.sleep(1)
    os.kill(stopped, signal.SIGKILL)  # torchrun would after 30 s
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "slow: " in out and "10 times the median" in out
    line = next(line for line in err.splitlines() if "dist_timeout=8 s" in line)
    for part in ("rank 0, update ", "bucket 64px/", "samples datasets/", "stuck-rank0.txt"):
        assert part in line
    stacks = (run / "stuck-rank0.txt").read_text()
    assert "most recent call first" in stacks and "_update" in stacks
