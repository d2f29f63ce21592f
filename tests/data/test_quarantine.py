"""Files that kill whoever reads them."""

import ctypes
import faulthandler
import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from video_files import write_video

from opensora.data import loader
from opensora.data.media import MediaError
from opensora.data.metadata import add_metadata
from opensora.data.quarantine import Quarantine
from opensora.data.sampler import SampleRequest
from opensora.data.video import read_clip


def crash() -> None:
    faulthandler.disable()  # says no more than is expected
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("media") / "a.mp4"))


@pytest.fixture
def guard():
    """Makes a Quarantine of a function, and ends its process after the test."""
    made, others = [], set(psutil.Process().children())

    def make(function, longest=60):
        made.append(Quarantine(function, longest))
        return made[-1]

    yield make
    for quarantine in made:
        quarantine.close()
        quarantine.close()  # does nothing
    assert set(psutil.Process().children()) <= others  # no process is left, not even a dead one


@pytest.fixture
def one_thread():
    """As in a worker: torch's interpolation rounds otherwise where several share an image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("resize", ["fast", "exact"])
def test_clips_are_what_the_function_gives(guard, video, one_thread, resize):
    read = guard(read_clip)
    for size in ((16, 16), (480, 640), (32, 48)):
        clip = read(video, [3, 7, 20], *size, resize)
        assert torch.equal(clip, read_clip(video, [3, 7, 20], *size, resize))
        clip += 1  # it is the caller's


def test_what_is_raised_arrives(guard, video, tmp_path):
    def unpicklable(path):
        raise type("Local", (Exception,), {})("of a kind that no other process knows")

    with pytest.raises(MediaError, match="too few frames: 40 can be decoded, number 50") as raised:
        guard(read_clip)(video, [50], 16, 16)
    assert raised.value.path == video
    with pytest.raises(FileNotFoundError, match="file not found"):
        guard(read_clip)(str(tmp_path / "absent.mp4"), [0], 16, 16)
    with pytest.raises(RuntimeError, match="Local: of a kind"):
        guard(unpicklable)("a")


@pytest.mark.parametrize(
    ("die", "end"),
    [
        (crash, "SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os._exit(3), "exit status 3"),
        (os.abort, "SIGABRT"),
    ],
)
def test_the_process_that_asked_goes_on(guard, die, end):
    def read(path):
        if path == "bad":
            faulthandler.disable()
            die()
        return torch.full((2, 3), float(path))

    guarded = guard(read)
    for _ in range(3):
        assert guarded("1").tolist() == [[1.0] * 3] * 2
        with pytest.raises(MediaError, match=rf"^bad: decoder crashed: reading the file ends the process \({end}\)$"):
            guarded("bad")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(MediaError):
            guarded("bad")
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_process_that_is_killed_once_costs_no_file(guard, tmp_path):
    def read(path):
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1)

    assert guard(read)("a").item() == 1


def test_the_process_ends_with_its_owner():
    read_end, write_end = os.pipe()
    owner = os.fork()
    if owner == 0:
        guarded = Quarantine(lambda path: torch.ones(1), 60)
        guarded("a")
        os.write(write_end, str(guarded.pid).encode())
        os._exit(0)
    os.waitpid(owner, 0)
    child = int(os.read(read_end, 20))
    deadline = time.monotonic() + 60
    status = Path(f"/proc/{child}/status")
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def deadly_table(tmp_path):
    """A dataset of ten videos of which number 3 makes the decoder crash."""
    paths = [write_video(tmp_path / f"{i}.mp4", num_frames=6) for i in range(10)]
    pd.DataFrame({"path": map(str, paths), "text": [f"video {i}" for i in range(10)]}).to_csv(tmp_path / "t.csv")
    add_metadata(tmp_path / "t.csv", tmp_path / "out.csv", 0)
    return str(tmp_path / "out.csv")


def test_a_run_goes_on_past_a_file_that_crashes_the_decoder(deadly_table, monkeypatch):
    def read_or_crash(path, *arguments):
        if path.endswith("/3.mp4"):
            crash()
        return read_clip(path, *arguments)

    monkeypatch.setattr(loader, "read_clip", read_or_crash)
    place = {"epoch": 0, "update": 0, "micro_step": 0}
    samples = [
        SampleRequest(i, num_frames=5, height=32, width=48, substitutes=(7,), seed=i, **place) for i in range(10)
    ]
    requests = [samples[i : i + 2] for i in range(0, 10, 2)]
    batches = list(loader.build_loader(loader.VideoTextDataset(deadly_table), requests, num_workers=2))
    assert [batch.index for batch in batches] == [[0, 1], [2, 7], [4, 5], [6, 7], [8, 9]]
    (rejected,) = batches[1].rejected
    assert rejected["index"] == 3 and rejected["replaced_by"] == 7
    assert rejected["reason"] == "decoder crashed: reading the file ends the process (SIGSEGV)"
    assert not any(batch.rejected for batch in batches[:1] + batches[2:])


def test_a_call_that_is_broken_off_leaves_no_answer_behind(guard, video):
    class Late(Exception):
        pass

    def read(path, seconds):
        time.sleep(seconds)
        return torch.full((2,), float(seconds))

    def ring(*_):
        raise Late

    quarantine = guard(read)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Late):
            quarantine(video, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(quarantine(video, 0), torch.zeros(2))


def test_a_read_that_never_ends_is_given_up(guard, video, tmp_path):
    """A named pipe that nobody writes to, and a process that is stopped."""
    os.mkfifo(tmp_path / "pipe.mp4")
    read = guard(read_clip)
    for seconds in ("2", "1"):  # what it took before is remembered
        read.longest = 2
        with pytest.raises(MediaError, match=rf"pipe.mp4: too slow: reading it takes longer than {seconds} s$"):
            read(str(tmp_path / "pipe.mp4"), [0], 16, 16)
        read.longest = 60
        assert read(video, [0], 16, 16).shape == (3, 1, 16, 16)
    os.kill(read.pid, signal.SIGSTOP)
    read.longest = 1
    with pytest.raises(MediaError, match="too slow"):
        read(video, [0], 16, 16)
    read.longest = 60
    assert read(video, [0], 16, 16).shape == (3, 1, 16, 16)


def test_a_run_goes_on_past_a_file_that_cannot_be_read_to_an_end(deadly_table, tmp_path):
    (tmp_path / "3.mp4").unlink()
    os.mkfifo(tmp_path / "3.mp4")
    place = {"epoch": 0, "update": 0, "micro_step": 0}
    requests = [[SampleRequest(i, 5, 32, 48, substitutes=(7,), seed=i, **place)] for i in range(2, 5)]
    dataset = loader.VideoTextDataset(deadly_table, read_timeout=10)
    batches = list(loader.build_loader(dataset, requests, num_workers=1))
    assert [batch.index for batch in batches] == [[2], [7], [4]]
    assert [line["reason"] for line in batches[1].rejected] == ["too slow: reading it takes longer than 10 s"]
    with pytest.raises(ValueError, match="read_timeout=0 must be"):
        loader.VideoTextDataset(deadly_table, read_timeout=0)


def test_slow_files_cost_a_batch_twice_the_time_of_one(guard, tmp_path):
    """Of however many that never answer. One that answers again is read again."""

    def read(path):
        if not (tmp_path / "well").exists():
            time.sleep(300)
        return torch.ones(1)

    quarantine = guard(read, longest=1.2)
    quarantine.begin_batch()
    taken = []
    for i in range(12):
        with pytest.raises(MediaError, match=f"slow {i}: too slow: ") as raised:
            quarantine(f"slow {i}")
        taken.append(float(re.search("longer than (.*) s", str(raised.value))[1]))
    assert taken[:3] == [1.2, 0.6, 0.3] and 2.39 < sum(taken) <= 2.4
    quarantine.begin_batch()
    with pytest.raises(MediaError, match=r"longer than 0.6 s"):
        quarantine("slow 0")
    with pytest.raises(MediaError, match=r"longer than 0.9 s"):  # it was given little time for the others' sake
        quarantine("slow 9")
    (tmp_path / "well").touch()
    quarantine.longest = 240
    quarantine.begin_batch()
    assert quarantine("slow 0").item() == 1


def test_processes_that_do_not_end_are_not_left_behind_without_number(guard, monkeypatch):
    """As on a disk that is gone, where the kernel cannot end them. Here they are not killed."""
    kill = os.kill
    quarantine = guard(lambda path: time.sleep(60) if path == "hangs" else torch.ones(1), longest=0.01)
    monkeypatch.setattr("opensora.data.quarantine._SECONDS_TO_DIE", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, signum: None)
    for reason in [*["too slow"] * 5, *["not tried: 5 killed processes wait for a disk"] * 2]:
        with pytest.raises(MediaError, match=reason):
            quarantine("hangs")
    monkeypatch.undo()
    for pid in quarantine._left_behind:
        kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    quarantine.longest = 60
    assert quarantine("good").item() == 1
