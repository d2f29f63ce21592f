"""scripts/cnv/meta.py as it is documented, on real files."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from in_process import run_in_process
from PIL import Image
from video_files import cut_file, draw_frame, write_audio, write_video

from opensora.data.metadata import add_metadata
from opensora.data.probe import probe
from opensora.data.probe_files import Progress, WorkerPool
from opensora.data.probe_journal import ProbeJournal
from opensora.data.records import Table
from opensora.data.table_stream import TableError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "cnv" / "meta.py"
TEXTS = ['a "quoted", cat', "two\nlines", "crlf\r\nline", "ünïcode – 猫 🐈", "  spaces  ", "123", "NA", "it's; a|t", ""]
FACTS = ["height", "width", "fps", "num_frames", "aspect_ratio", "resolution"]
# What the files in `folder` are: height, width, fps, num_frames.
GOOD = {
    "a.mp4": (48, 64, 24.0, 20),
    "sub/b.mkv": (32, 48, 29.97, 12),
    "turned.mp4": (64, 48, 24.0, 3),
    "picture.png": (48, 64, None, 1),
}
BAD = {
    "absent.mp4": "file not found",
    "cut.mp4": "truncated",
    "empty.mp4": "empty file",
    "audio.mp4": "no video stream",
    "text.mp4": "not a video or image",
    "": "empty path",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    write_video(folder / "a.mp4", num_frames=20)
    write_video(folder / "sub/b.mkv", num_frames=12, height=32, width=48, rate=Fraction(30000, 1001))
    write_video(folder / "turned.mp4", num_frames=3, rotation=90)
    Image.fromarray(draw_frame(0, 48, 64)).save(folder / "picture.png")
    cut_file(folder / "a.mp4", folder / "cut.mp4", 0.5)
    (folder / "empty.mp4").touch()
    write_audio(folder / "audio.mp4")
    (folder / "text.mp4").write_text("no video")
    return folder


def make_table(path: Path, paths: list[str]) -> pd.DataFrame:
    data = pd.DataFrame(
        {"path": paths, "text": (TEXTS * len(paths))[: len(paths)], "id": [f"00{i}" for i in range(len(paths))]}
    )
    if path.suffix == ".csv":
        data.to_csv(path, index=False)
    else:
        data.to_parquet(path)
    return data


def read_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        types = {"path": str, "text": str, "id": str}
        return pd.read_csv(path, dtype=types, keep_default_na=False, na_values={"fps": [""]})
    return pd.read_parquet(path)


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("target", [".csv", ".parquet"])
@pytest.mark.parametrize("source", [".csv", ".parquet"])
def test_facts_are_added_and_bad_rows_are_set_aside(folder, tmp_path, source, target, num_workers):
    given, output = folder / f"table_{os.getpid()}{source}", tmp_path / f"out{target}"
    paths = [name for pair in zip([*GOOD, *GOOD], [*BAD, "a.mp4", "a.mp4"], strict=True) for name in pair]
    data = make_table(given, paths)
    summary = add_metadata(given, output, num_workers)

    result = read_table(output)
    assert list(result.columns) == [*data.columns, *FACTS]
    kept = data[data.path.isin(list(GOOD))].reset_index(drop=True)
    pd.testing.assert_frame_equal(result[list(data.columns)], kept)
    for row in result.itertuples():
        height, width, fps, num_frames = GOOD[row.path]
        assert (row.height, row.width, row.num_frames, row.resolution) == (height, width, num_frames, height * width)
        assert row.aspect_ratio == height / width
        assert np.isnan(row.fps) if fps is None else row.fps == fps
    assert all(result[name].dtype == np.int64 for name in ("height", "width", "num_frames", "resolution"))

    rejected = pd.read_csv(f"{output}.rejected.csv", dtype=str, keep_default_na=False)
    assert list(rejected.columns) == [*data.columns, "reason"]
    left = data[~data.path.isin(list(GOOD))].reset_index(drop=True)
    pd.testing.assert_frame_equal(rejected[list(data.columns)], left)
    assert [reason.split(":")[0] for reason in rejected.reason] == [BAD[path] for path in left.path]
    assert summary.written == len(kept) and summary.rejected == dict.fromkeys(BAD.values(), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{target}", f"out{target}.rejected.csv"]


@pytest.mark.parametrize("flag", ["--num_workers", "--num-workers"])
def test_the_documented_command(folder, tmp_path, flag):
    make_table(tmp_path / "pexels_45k.csv", ["a.mp4", "absent.mp4", "sub/b.mkv", "cut.mp4", "gone.mp4"])
    done = run("--input", tmp_path / "pexels_45k.csv", "--output", tmp_path / "pexels_45k_nec.csv", flag, 0, cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"2 rows written to {tmp_path}/pexels_45k_nec.csv",
        f"3 rows rejected (2 file not found, 1 truncated), listed in {tmp_path}/pexels_45k_nec.csv.rejected.csv",
    ]
    lines = (tmp_path / "pexels_45k_nec.csv").read_text().splitlines()
    assert lines[0] == "path,text,id,height,width,fps,num_frames,aspect_ratio,resolution"
    assert lines[1] == 'a.mp4,"a ""quoted"", cat",000,48,64,24.0,20,0.75,3072'


def test_all_cores_by_default_and_the_same_result(folder, tmp_path):
    make_table(folder / "default.csv", [*GOOD, *BAD] * 3)
    done = run("--input", folder / "default.csv", "--output", tmp_path / "parallel.csv")
    assert done.returncode == 0 and done.stderr == ""
    add_metadata(folder / "default.csv", tmp_path / "serial.csv", 0)
    for suffix in ("", ".rejected.csv"):
        assert (tmp_path / f"parallel.csv{suffix}").read_bytes() == (tmp_path / f"serial.csv{suffix}").read_bytes()


def test_training_reads_the_table(folder, tmp_path):
    make_table(folder / "train.csv", [*GOOD] * 3)
    add_metadata(folder / "train.csv", tmp_path / "train_nec.csv", 0)
    table = Table(tmp_path / "train_nec.csv")
    assert [table.text(row) for row in range(len(TEXTS))] == TEXTS
    assert table.num_frames[:4].tolist() == [20, 12, 3, 1] and not table.unusable
    assert table.fps[:3].tolist() == [24.0, 29.97, 24.0] and np.isnan(table.fps[3])


def test_many_chunks_keep_the_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora.data.metadata.ROWS_PER_WORKER", 3)
    data = make_table(folder / "many.csv", ["a.mp4", "absent.mp4", "picture.png", "turned.mp4"] * 5)
    add_metadata(folder / "many.csv", tmp_path / "many.csv", 2)
    expected = data[data.path != "absent.mp4"]
    assert read_table(tmp_path / "many.csv").id.tolist() == expected.id.tolist()


def test_paths_are_looked_up_from_here_then_beside_the_table(folder, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("not the video meant")
    make_table(tmp_path / "t.csv", ["a.mp4", str(folder / "a.mp4"), "./sub/../a.mp4"])
    monkeypatch.chdir(folder)
    add_metadata(tmp_path / "t.csv", tmp_path / "out.csv", 0)
    assert read_table(tmp_path / "out.csv").path.tolist() == ["a.mp4", str(folder / "a.mp4"), "./sub/../a.mp4"]


def test_facts_that_are_there_already_are_replaced_in_place(folder, tmp_path):
    pd.DataFrame({"height": [1], "path": ["a.mp4"], "fps": ["?"]}).to_csv(folder / "again.csv", index=False)
    add_metadata(folder / "again.csv", tmp_path / "out.csv", 0)
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "height,path,fps,width,num_frames,aspect_ratio,resolution",
        "48,a.mp4,24.0,64,20,0.75,3072",
    ]


def test_malformed_rows_are_rejected(folder, tmp_path):
    (folder / "wide.csv").write_text("path,text\na.mp4,red, and blue\na.mp4,green\n")
    summary = add_metadata(folder / "wide.csv", tmp_path / "out.csv", 0)
    assert summary.written == 1 and summary.rejected == {"malformed row": 1}
    assert 'a.mp4,"red, and blue",malformed row: 3 fields' in (tmp_path / "out.csv.rejected.csv").read_text()


def test_the_list_of_an_earlier_run_does_not_stay(folder, tmp_path):
    make_table(folder / "fine.csv", ["a.mp4"])
    (tmp_path / "out.csv.rejected.csv").write_text("old")
    assert not add_metadata(folder / "fine.csv", tmp_path / "new/../out.csv", 0).rejected
    assert not (tmp_path / "out.csv.rejected.csv").exists()


def test_when_every_row_is_rejected_only_the_list_is_written(folder, tmp_path):
    make_table(folder / "bad.csv", ["absent.mp4", "cut.mp4", "absent.mp4"])
    done = run_in_process(SCRIPT, "--input", folder / "bad.csv", "--output", tmp_path / "out.csv", "--num_workers", 0)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: no row of '{folder}/bad.csv' can be used: 2 file not found, 1 truncated; "
        f"see {tmp_path}/out.csv.rejected.csv\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv.rejected.csv"]


def test_mistakes_are_one_line_and_an_exit_code(folder, tmp_path):
    make_table(folder / "good.csv", ["a.mp4"])
    (folder / "no_path.csv").write_text("file,text\na.mp4,x\n")
    (folder / "no_rows.csv").write_text("path,text\n")
    (folder / "link.csv").symlink_to(folder / "good.csv")
    out = tmp_path / "out.csv"
    for given, output, workers, message in [
        (folder / "absent.csv", out, 0, f"table '{folder}/absent.csv' does not exist"),
        (folder / "no_path.csv", out, 0, "has no column 'path': it has file, text"),
        (folder / "no_rows.csv", out, 0, "has no rows"),
        (folder / "a.mp4", out, 0, "must end in .csv or .parquet"),
        (folder / "good.csv", tmp_path / "out.json", 0, "must end in .csv or .parquet"),
        (folder / "good.csv", folder / "link.csv", 0, "is the input: give it another name"),
        (folder / "good.csv", out, -1, "num_workers=-1 is negative"),
        (folder / "good.csv", folder / "a.mp4/out.csv", 0, "cannot be written"),
    ]:
        with pytest.raises((TableError, OSError)) as raised:
            add_metadata(given, output, workers)
        assert message in str(raised.value) and "\n" not in str(raised.value)
    done = run_in_process(SCRIPT, "--input", folder / "absent.csv", "--output", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: table '{folder}/absent.csv' does not exist\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_table_and_no_process(folder, tmp_path, num_workers, signum):
    make_table(folder / "endless.csv", ["sub/b.mkv"] * 100_000)
    command = [sys.executable, str(SCRIPT), "--input", folder / "endless.csv", "--output", tmp_path / "out.csv"]
    process = subprocess.Popen(
        [*map(str, command), "--num_workers", str(num_workers)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not any(tmp_path.glob(".*.part")):  # the draft: rows are being read
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    # Ctrl-C is sent to the whole group by a terminal, a request to end to one process by a scheduler.
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    _, errors = process.communicate(timeout=240)
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "out.csv.rejected.csv").exists()
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert errors == f"interrupted: {tmp_path}/out.csv was not written; the same command goes on from here\n"
        assert [path.name for path in tmp_path.iterdir()] == [".out.csv.progress"]  # no draft
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        for _ in range(4000):
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path, monkeypatch, num_workers):
    make_table(folder / "resumed.csv", [*GOOD, *BAD] * 3)
    add_metadata(folder / "resumed.csv", tmp_path / "whole.csv", 0)
    read = []

    def stop_at(number):
        def probe_or_stop(path, verify):
            read.append(path)
            if len(read) == number:
                raise KeyboardInterrupt
            return probe(path, verify)

        monkeypatch.setattr("opensora.data.probe_files.probe", probe_or_stop)

    stop_at(12)
    with pytest.raises(KeyboardInterrupt):
        add_metadata(folder / "resumed.csv", tmp_path / "out.csv", 0)
    journal = tmp_path / ".out.csv.progress"
    assert not (tmp_path / "out.csv").exists() and journal.read_bytes().count(b"\n") > 11
    journal.write_bytes(journal.read_bytes()[:-3])  # the machine went down while it wrote
    before = len(read)
    stop_at(-1)
    add_metadata(folder / "resumed.csv", tmp_path / "out.csv", num_workers)
    for suffix in ("", ".rejected.csv"):
        assert (tmp_path / f"out.csv{suffix}").read_bytes() == (tmp_path / f"whole.csv{suffix}").read_bytes()
    assert not journal.exists()
    if num_workers == 0:
        good = {Path(name).name for name in GOOD}
        tried_again = sum(Path(path).name not in good for path in read[:10])
        # of 30 rows, 3 have no path; 11 files were read, the last was cut off, and what failed is tried again
        assert len(read) - before == 27 - 11 + 1 + tried_again


def test_a_journal_of_another_table_or_way_is_not_used(folder, tmp_path):
    table, journal = folder / "other.csv", tmp_path / "journal"
    make_table(table, ["a.mp4"] * 3)

    def known(verify):
        with ProbeJournal(journal, table, verify) as opened:
            return list(opened.complete(lambda paths: iter(["new" for _ in paths]), ["a.mp4"] * 3))

    with ProbeJournal(journal, table, False) as opened:
        assert list(opened.complete(lambda paths: iter(["old", probe(folder / "a.mp4")]), ["a.mp4"] * 2))
        code = (
            "import sys; from pathlib import Path; from opensora.data.probe_journal import ProbeJournal;"
            "ProbeJournal(Path(sys.argv[1]), Path(sys.argv[2]), False)"
        )
        other = subprocess.run([sys.executable, "-c", code, journal, table], capture_output=True, text=True)
        assert "another run writes the same output" in other.stderr
    assert known(False) == ["new", probe(folder / "a.mp4"), "new"]  # "old" could not be read: it is tried again
    assert known(True) == ["new"] * 3
    make_table(table, ["a.mp4"] * 4)
    assert known(True) == ["new"] * 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_verify_finds_damaged_pictures(folder, tmp_path, num_workers):
    data = bytearray((folder / "a.mp4").read_bytes())
    end = data.index(b"moov") - 4
    data[end // 2 : end] = bytes(end - end // 2)
    (folder / "rotten.mp4").write_bytes(data)
    make_table(folder / "verified.csv", [*GOOD, "rotten.mp4"])
    add_metadata(folder / "verified.csv", tmp_path / "out.csv", num_workers)
    assert read_table(tmp_path / "out.csv").path.tolist() == [*GOOD, "rotten.mp4"]
    summary = add_metadata(folder / "verified.csv", tmp_path / "out.csv", num_workers, verify=True)
    assert read_table(tmp_path / "out.csv").path.tolist() == [*GOOD] and summary.rejected == {"damaged": 1}


def test_a_file_that_kills_its_reader_is_rejected_and_the_others_are_read():
    def read(item):
        if item == "crash":
            faulthandler.disable()  # says no more than is expected
            ctypes.string_at(0)  # a segmentation fault, as of a decoder
        if item == "kill":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        if item == "exit":
            os._exit(3)
        return item

    items = ["a", "crash", *"bcdefgh" * 20, "kill", "exit", *"xyz" * 20, "crash"]
    pool = WorkerPool(read, 3, 60)
    try:
        for _ in range(2):  # workers stay
            results = list(pool.map(items))
            killed = {"crash": "SIGSEGV", "kill": "SIGKILL", "exit": "exit status 3"}
            prefix = "unreadable: reading it ends the process"
            assert results == [f"{prefix} ({killed[item]})" if item in killed else item for item in items]
    finally:
        pool.close()


def test_a_worker_that_is_killed_once_costs_no_file(tmp_path):
    def read(item):
        if item == "17" and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    pool = WorkerPool(read, 2, 60)
    try:
        items = [str(i) for i in range(100)]
        assert list(pool.map(items)) == items and (tmp_path / "killed").exists()
    finally:
        pool.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_file_whose_reading_never_ends_is_given_up(folder, tmp_path, num_workers):
    """A named pipe that nobody writes to, and a worker that is stopped."""
    os.mkfifo(tmp_path / "pipe.mp4")
    good = [str(folder / name) for name in GOOD]
    paths = [good[0], str(tmp_path / "pipe.mp4"), *good[1:], str(tmp_path / "pipe.mp4")]
    pd.DataFrame({"path": paths, "text": "a"}).to_csv(tmp_path / "t.csv", index=False)
    summary = add_metadata(tmp_path / "t.csv", tmp_path / "out.csv", num_workers, longest=5)
    assert read_table(tmp_path / "out.csv").path.tolist() == good and summary.rejected == {"too slow": 2}


def test_a_stopped_worker_is_replaced():
    def read(item):
        if item == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return item

    pool = WorkerPool(read, 2, 1.5)
    try:
        items = [*"abc", "stop", *"defg" * 20]
        late = "too slow: reading it takes longer than 1.5 s"
        assert list(pool.map(items)) == [late if item == "stop" else item for item in items]
    finally:
        pool.close()


class _Terminal:
    """A stream that says it is, or is not, a terminal."""

    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    terminal, log, quick = _Terminal(True), _Terminal(False), _Terminal(False)
    bar = Progress(1000, terminal)
    bar.add(1000)
    bar.close()
    assert "1000/1000" in terminal.text

    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = Progress(1000, log)
    for _ in range(10):
        lines.add(100)
    lines.close()
    assert 2 <= log.text.count("\n") <= 5 and "of 1,000 files" in log.text and "\r" not in log.text

    monkeypatch.undo()
    silent = Progress(10, quick)
    silent.add(10)
    silent.close()
    assert quick.text == ""
