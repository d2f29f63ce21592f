"""A run that is killed again and again ends as the one that nobody disturbed: `make chaos`."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from recorded_train import FULL_DISK

from opensora.checkpoint_folder import list_checkpoints
from opensora.models.weight_files import open_averages, open_weights

KILLS = int(os.environ.get("CHAOS_KILLS", 30))
STEPS = 15 * (KILLS + 2)  # more than are done before the last event
SCRIPT = "tests/chaos/recorded_train.py"
REPORT = Path(__file__).parents[2] / "outputs/chaos.json"
PATIENCE_S = 300


class Run:
    """Two ranks under torchrun, which starts them again when one ends."""

    def __init__(self, shapes, outputs: Path, name: str):
        self.folder = outputs / name
        settings = ["--outputs", str(outputs), "--exp-name", name, "--auto-resume", "True", "--max-steps", str(STEPS)]
        settings += ["--ckpt-every", "5", "--num-workers", "1", "--ema-decay", "0.9", "--keep-n-latest", "3"]
        arguments = shapes.train_arguments(*settings)
        self.process = shapes.start(SCRIPT, *arguments, ranks=2, restarts=10 * KILLS, log=outputs / f"{name}.log")

    def ranks(self) -> list[int]:
        """The processes of the ranks, if both are there."""
        launcher = self.process.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        found = [int(pid) for pid in children]
        return found if len(found) == 2 else []

    def samples(self, rank: int) -> list[dict]:
        """What was recorded; a kill may leave half a line."""
        path, found = self.folder / f"samples-rank{rank}.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def trains(self) -> bool:
        """Whether one of the processes that are there was the last to begin an update."""
        ranks, path = self.ranks(), self.folder / "samples-rank0.jsonl"
        if not ranks or not path.exists():
            return False
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 1000))
            lines = file.read().decode().split("\n")
        return len(lines) > 1 and any(f'{{"process": {pid},' in lines[-2] for pid in ranks)

    def wait_for(self, condition) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)

    def wait_for_new_ranks(self, old: list[int]) -> None:
        self.wait_for(lambda: (ranks := self.ranks()) and not set(ranks) & set(old))


def kill_rank(run: Run, ranks: list[int], draw: random.Random) -> None:
    os.kill(draw.choice(ranks), signal.SIGKILL)


def kill_in_save(run: Run, ranks: list[int], draw: random.Random) -> None:
    run.wait_for(lambda: any(run.folder.glob(".tmp-epoch*")))
    time.sleep(draw.uniform(0, 0.05))
    kill_rank(run, ranks, draw)


def kill_worker(run: Run, ranks: list[int], draw: random.Random) -> None:
    pid = draw.choice(ranks)
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(draw.choice(workers)), signal.SIGKILL)


def fill_disk(run: Run, ranks: list[int], draw: random.Random) -> None:
    (run.folder / f"{FULL_DISK}{draw.randrange(2)}").touch()


def corrupt_shard(run: Run, ranks: list[int], draw: random.Random) -> None:
    """Damage the newest checkpoint, with the ranks dead or unable to save another one."""
    run.wait_for(lambda: len(list_checkpoints(run.folder)) >= 2)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    newest = list_checkpoints(run.folder)[-1]
    shard = max((newest / "optimizer").rglob("*"), key=lambda path: path.stat().st_size)
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def disturb(run: Run, draw: random.Random) -> Counter:
    """All that goes wrong, in random order and at random moments; how often what did, and how often both ranks were
    started again after it."""
    in_saves, in_loader = KILLS // 3, max(1, KILLS // 6)
    events = [kill_in_save] * in_saves + [kill_worker] * in_loader + [kill_rank] * (KILLS - in_saves - in_loader)
    events += [fill_disk, corrupt_shard]
    draw.shuffle(events)
    done: Counter = Counter()
    for event in events:
        if event is kill_rank and draw.random() < 0.2:
            run.wait_for(run.ranks)
            time.sleep(draw.uniform(0, 5))  # while it starts
        else:
            run.wait_for(run.trains)
            time.sleep(draw.uniform(0, 1))
        run.wait_for(run.ranks)
        ranks = run.ranks()
        event(run, ranks, draw)
        run.wait_for_new_ranks(ranks)
        done[event.__name__] += 1
        done["resumed"] += 1
    return done


def losses(run: Run) -> list[tuple]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"], line["samples"]) for line in lines]


def consumed(run: Run) -> dict[tuple[int, int], list[int]]:
    """The rows of each (rank, update); an update that was done again took the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(2):
        for line in run.samples(rank):
            assert found.setdefault((rank, line["update"]), line["rows"]) == line["rows"]
    return found


def same_end(run: Run, other: Run) -> bool:
    equal = True
    for open_ in (open_weights, open_averages):
        first, second = (open_(list_checkpoints(r.folder)[-1]) for r in (run, other))
        names = list(first.shapes)
        a, b = first.read(names), second.read(names)
        equal &= first.shapes == second.shapes and all(torch.equal(a[name], b[name]) for name in names)
    return equal


@pytest.mark.slow
def test_chaos(shapes, tmp_path):
    begin, seed = time.monotonic(), int(os.environ.get("CHAOS_SEED", random.randrange(2**32)))
    print(f"CHAOS_SEED={seed}")
    REPORT.unlink(missing_ok=True)
    whole = Run(shapes, tmp_path, "whole")
    assert whole.process.wait(PATIENCE_S * 4) == 0
    disturbed = Run(shapes, tmp_path, "disturbed")
    try:
        done = disturb(disturbed, random.Random(seed))
        assert disturbed.process.wait(PATIENCE_S * 4) == 0
    finally:
        disturbed.process.kill()  # its ranks go with it
    report = {
        "kills": done["kill_rank"] + done["kill_in_save"] + done["kill_worker"],
        "kills_in_saves": done["kill_in_save"],
        "kills_in_loader": done["kill_worker"],
        "full_disks": done["fill_disk"],
        "corrupted_shards": done["corrupt_shard"],
        "resumed": done["resumed"],
        "saves_in_background": (disturbed.folder / "log.txt").read_text().count("now being written to"),
        "resumed_from_checkpoints": (disturbed.folder / "log.txt").read_text().count("resumed from"),
        "losses_equal": losses(disturbed) == losses(whole),
        "weights_equal": same_end(disturbed, whole),
        "samples_equal": consumed(disturbed) == consumed(whole),
        "updates": STEPS,
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
    }
    report["equal"] = report["losses_equal"] and report["weights_equal"] and report["samples_equal"]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    assert report["equal"] and report["kills"] == KILLS and report["resumed"] == KILLS + 2
