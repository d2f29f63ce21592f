import json
import subprocess
import sys
import threading
from datetime import datetime

import pytest

from opensora.checkpoint_folder import list_checkpoints
from opensora.training.background_save import Retention, prune, publish
from opensora.training.run_folder import RunFolder, default_experiment_name

HOLD = """
import sys, time
from pathlib import Path
from opensora.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
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
        RunFolder(tmp_path)
    holder.kill()
    holder.wait()
    RunFolder(tmp_path)


def test_a_run_that_is_restarted_waits_for_the_end_of_the_one_before(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    RunFolder(tmp_path, patience_s=30)
    assert holder.wait() != 0


def test_a_new_run_does_not_write_over_checkpoints(tmp_path):
    checkpoint = tmp_path / "epoch0-global_step5"
    checkpoint.mkdir()
    (checkpoint / "running_states.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds checkpoints; continue it with --load"):
        RunFolder(tmp_path).check_new()


def test_unfinished_saves_are_removed(tmp_path):
    unfinished = tmp_path / ".tmp-epoch0-global_step5" / "model"
    unfinished.mkdir(parents=True)
    RunFolder(tmp_path)
    assert not unfinished.parent.exists()


def test_metrics_are_cut_back_to_the_step_of_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    folder = RunFolder(tmp_path)
    folder.cut_metrics(5)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:5]


def write_checkpoint(folder, step, text="{}"):
    checkpoint = folder / f"epoch0-global_step{step}"
    checkpoint.mkdir()
    (checkpoint / "running_states.json").write_text(text)
    return checkpoint


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step)
    RunFolder(tmp_path).cut_checkpoints(5)
    prune(tmp_path, Retention(2), write_checkpoint(tmp_path, 6))
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["5", "6"]
    write_checkpoint(tmp_path, 15)
    RunFolder(tmp_path).cut_checkpoints(6)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["5", "6"]
    abandoned = {path.name.removeprefix("abandoned-epoch0-global_step") for path in tmp_path.glob("abandoned-*")}
    assert abandoned == {"10", "15", "15.2"}


def test_what_is_just_published_is_never_pruned(tmp_path):
    published, *_ = [write_checkpoint(tmp_path, step) for step in (6, 10, 15)]
    prune(tmp_path, Retention(1), published)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch0-global_step6", "epoch0-global_step15"]


def test_a_checkpoint_that_was_about_to_be_replaced_is_there_again(tmp_path):
    """Killed between the renames of a second save of step 5, and while what one of step 6 replaced was removed."""
    write_checkpoint(tmp_path, 5, "old").rename(tmp_path / ".tmp-replaced-epoch0-global_step5")
    write_checkpoint(tmp_path, 5, "new").rename(tmp_path / ".tmp-epoch0-global_step5")
    write_checkpoint(tmp_path, 6, "old").rename(tmp_path / ".tmp-replaced-epoch0-global_step6")
    write_checkpoint(tmp_path, 6, "new")
    RunFolder(tmp_path)
    assert [(path / "running_states.json").read_text() for path in list_checkpoints(tmp_path)] == ["old", "new"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_same_step_is_saved_again(tmp_path):
    final, temporary = write_checkpoint(tmp_path, 5, "old"), tmp_path / ".tmp-epoch0-global_step5"
    write_checkpoint(tmp_path, 6, "new").rename(temporary)
    publish(temporary, final)
    assert [(path / "running_states.json").read_text() for path in list_checkpoints(tmp_path)] == ["new"]
    assert not list(tmp_path.glob(".tmp-*"))
