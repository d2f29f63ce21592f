import json
import subprocess
import sys
import threading
from datetime import datetime

import pytest

from opensora.training.run_folder import RunFolder, default_experiment_name

HOLD = """
import sys, time
from pathlib import Path
from opensora.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), resumes=False)
print("held", flush=True)
time.sleep(60)
"""


def test_documented_name():
    now = datetime(2026, 11, 22, 16, 3, 5)
    assert default_experiment_name("configs/diffusion/train/stage1.py", now) == "261122_160305-diffusion_train_stage1"
    assert default_experiment_name("/a/configs/diffusion/x.py", now) == "261122_160305-diffusion_x"
    assert default_experiment_name("mine.py", now) == "261122_160305-mine"


def test_a_folder_is_held_by_one_run_and_freed_by_its_death(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by another run \\(process {holder.pid} on "):
        RunFolder(tmp_path, resumes=True)
    holder.kill()
    holder.wait()
    RunFolder(tmp_path, resumes=True)


def test_a_run_that_is_restarted_waits_for_the_end_of_the_one_before(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    RunFolder(tmp_path, resumes=True, patience_s=30)
    assert holder.wait() != 0


def test_a_new_run_does_not_write_over_checkpoints(tmp_path):
    checkpoint = tmp_path / "epoch0-global_step5"
    checkpoint.mkdir()
    (checkpoint / "running_states.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds checkpoints; continue it with --load"):
        RunFolder(tmp_path, resumes=False)
    RunFolder(tmp_path, resumes=True)


def test_unfinished_saves_are_removed(tmp_path):
    unfinished = tmp_path / ".tmp-epoch0-global_step5" / "model"
    unfinished.mkdir(parents=True)
    RunFolder(tmp_path, resumes=False)
    assert not unfinished.parent.exists()


def test_metrics_are_cut_back_to_the_step_of_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    folder = RunFolder(tmp_path, resumes=True)
    folder.cut_metrics(5)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:5]
