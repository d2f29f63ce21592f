"""Files that are whole once they have their name, and files that one process holds."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from opensora import durable
from opensora.durable import HeldError, hold, lock, put_in_place, sync_folder, whole_file, write_synced, write_whole


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_bytes(b"n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    write_whole(path, "new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.touch(), other.touch()


def test_a_name_as_long_as_names_may_be_can_be_written(tmp_path):
    longest = tmp_path / "new" / ("a" * 251 + ".mp4")
    write_whole(longest, "a")
    assert longest.read_text() == "a"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_sync(descriptor)

    def replace(source, target):
        done.append(("rename", Path(source).name, Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "new").mkdir()
    write_synced(tmp_path / "new/weights", lambda file: file.write(b"1"))
    put_in_place(tmp_path / "new", tmp_path / "final")
    assert done == [("sync", "weights"), ("sync", "new"), ("rename", "new", "final"), ("sync", tmp_path.name)]


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_is_no_error_but_a_broken_disk_is(tmp_path, monkeypatch, code, passes):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError):
            sync_folder(tmp_path)


def in_another_process(work) -> str:
    """What `work` raises there, as text."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def call():
        try:
            work()
            results.put("")
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")

    process = context.Process(target=call)
    process.start()
    process.join()
    return results.get()


def test_one_process_holds_a_file(tmp_path):
    path = tmp_path / ".lock"
    held = hold(path)
    assert in_another_process(lambda: hold(path)).startswith(f"HeldError: process {os.getpid()} on ")
    held.close()
    assert in_another_process(lambda: hold(path)) == ""
    hold(path).close()  # that process has ended, and its lock with it


def test_a_forked_process_does_not_hold_what_its_parent_does(tmp_path):
    context, path = multiprocessing.get_context("fork"), tmp_path / ".lock"
    held, stop = hold(path), context.Event()
    child = context.Process(target=stop.wait)
    child.start()
    held.close()
    assert in_another_process(lambda: hold(path)) == ""
    stop.set()
    child.join()


def test_without_locks_a_warning_is_all(tmp_path, monkeypatch, capfd):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(durable, "lockf", unsupported)
    with open(tmp_path / "a", "w") as file:
        lock(file)
    hold(tmp_path / "b").close()
    with pytest.raises(HeldError):
        monkeypatch.setattr(durable, "lockf", lambda *_: (_ for _ in ()).throw(BlockingIOError(errno.EAGAIN, "")))
        hold(tmp_path / "b")
