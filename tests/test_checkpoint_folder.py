import json
import logging
import os

import pytest

from opensora.checkpoint_folder import folder_name, list_checkpoints, parse_folder_name, resolve_checkpoint
from opensora.common import get_logger


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "exp"
    folder.mkdir(parents=True)
    (folder / "config.txt").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    return folder


def write_checkpoint(run_folder, epoch, step, complete=True, name=None):
    folder = run_folder / (name or folder_name(epoch, step))
    (folder / "model").mkdir(parents=True)
    if complete:
        (folder / "running_states.json").write_text(json.dumps({"epoch": epoch, "global_step": step}))
    return folder


@pytest.fixture
def said(caplog, monkeypatch):
    """The logger's lines."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, logger="opensora")
    return caplog


def test_names():
    assert folder_name(3, 12000) == "epoch3-global_step12000"
    assert parse_folder_name("outputs/x/epoch3-global_step12000") == (3, 12000)
    assert parse_folder_name("outputs/x/epoch3-global_step12000/") == (3, 12000)
    for other in ("outputs/x", ".tmp-epoch3-global_step12", "epoch3-global_step12.tmp", "epoch-global_step"):
        assert parse_folder_name(other) is None


def test_list_is_by_step_and_complete_only(run_folder):
    late = write_checkpoint(run_folder, 1, 1000)
    early = write_checkpoint(run_folder, 0, 200)
    write_checkpoint(run_folder, 1, 1200, complete=False)
    write_checkpoint(run_folder, 1, 1300, name=".tmp-epoch1-global_step1300")
    (run_folder / "epoch2-global_step9").write_text("a file")
    assert list_checkpoints(run_folder) == [early, late]
    assert list_checkpoints(run_folder / "nowhere") == []


def test_one_checkpoint_is_itself(run_folder, said):
    checkpoint = write_checkpoint(run_folder, 0, 5)
    write_checkpoint(run_folder, 0, 9)
    assert resolve_checkpoint(str(checkpoint)) == checkpoint
    assert resolve_checkpoint([str(checkpoint)]) == checkpoint
    assert not said.messages


def test_several_give_the_newest_complete_one(run_folder, said):
    older, newest = write_checkpoint(run_folder, 0, 90), write_checkpoint(run_folder, 1, 100)
    broken = write_checkpoint(run_folder, 1, 110, complete=False)
    assert resolve_checkpoint([str(path) for path in (broken, newest, older)]) == newest
    assert said.messages == [f"taking {newest}, the newest of 3 checkpoints given, 1 incomplete"]


def test_pattern_that_the_shell_left_alone(run_folder, said, monkeypatch):
    write_checkpoint(run_folder, 0, 90)
    newest = write_checkpoint(run_folder, 1, 100)
    assert resolve_checkpoint(f"{run_folder}/epoch*-global_step*") == newest
    monkeypatch.chdir(run_folder.parent.parent)
    assert resolve_checkpoint("outputs/exp/epoch*-global_step*").resolve() == newest
    assert len(said.messages) == 2


def test_run_folder_gives_its_newest(run_folder, said):
    write_checkpoint(run_folder, 0, 90)
    newest = write_checkpoint(run_folder, 0, 1000)
    write_checkpoint(run_folder, 0, 2000, complete=False)
    assert resolve_checkpoint(str(run_folder)) == newest
    assert said.messages == [f"{run_folder}: taking epoch0-global_step1000, the newest of 2 checkpoint(s)"]


def test_equal_steps_of_two_runs_give_the_one_written_last(run_folder):
    one = write_checkpoint(run_folder, 0, 10)
    other = write_checkpoint(run_folder.parent / "exp2", 0, 10)
    os.utime(one / "running_states.json", (2_000_000_000, 2_000_000_000))
    assert resolve_checkpoint([one, other]) == resolve_checkpoint([other, one]) == one


def test_weights_are_themselves(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert resolve_checkpoint(str(file)) == file
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    exported = tmp_path / "epoch0-global_step7"  # the weights of a checkpoint, copied without the rest
    (exported / "model").mkdir(parents=True)
    (exported / "model" / "model.safetensors.index.json").write_text("{}")
    assert resolve_checkpoint(str(exported)) == exported


@pytest.mark.parametrize("path", ["outputs/none", "outputs/none/epoch*-global_step*", ["a", "b"]])
def test_nothing_found(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder; give a checkpoint") as error:
        resolve_checkpoint(path)
    assert (path if isinstance(path, str) else "a, b") in str(error.value)
    assert "\n" not in str(error.value)


def test_incomplete_alone(run_folder):
    broken = write_checkpoint(run_folder, 0, 90, complete=False)
    with pytest.raises(FileNotFoundError, match="is not a whole checkpoint"):
        resolve_checkpoint(str(broken))
    other = write_checkpoint(run_folder, 0, 91, complete=False)
    with pytest.raises(FileNotFoundError, match="none of 2 checkpoints is complete"):
        resolve_checkpoint([str(broken), str(other)])
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        resolve_checkpoint(str(run_folder))


def test_empty_run_folder(run_folder):
    with pytest.raises(FileNotFoundError, match=r"exp holds no complete checkpoint .* and no weights"):
        resolve_checkpoint(str(run_folder))


def test_several_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 paths, none of them a checkpoint .*: give one path"):
        resolve_checkpoint(f"{tmp_path}/*.safetensors")
