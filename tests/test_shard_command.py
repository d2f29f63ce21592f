"""scripts/cnv/shard.py as it is documented."""

import fcntl
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pa_parquet
import pytest
from in_process import run_in_process

from opensora.data.records import Table
from opensora.data.shards import ShardIndex, write_shards

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "cnv" / "shard.py"


def make_table(file: Path, rows: int = 20, **columns) -> Path:
    sizes = {"num_frames": 9, "height": 48, "width": 64, "aspect_ratio": 0.75, "resolution": 3072, "fps": 24.0}
    texts = [f'"row"\n{i}, 猫' for i in range(rows)]
    data = pd.DataFrame({"path": [f"{i}.mp4" for i in range(rows)], "text": texts, **sizes} | columns)
    if file.suffix == ".csv":
        data.to_csv(file, index=False)
    else:
        data.to_parquet(file)
    return file


def run(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return run_in_process(SCRIPT, *arguments, cwd=cwd)


def start(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_documented_command(tmp_path, suffix):
    file = make_table(tmp_path / f"dataset{suffix}", path=["a.mp4", *[""] * 2, *["b.mp4"] * 17])
    done = start(file)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"20 rows in 1 shard: {tmp_path}/dataset",
        "rows that training will not use: 2 path is empty",
    ]
    names = {path.name for path in (tmp_path / "dataset").iterdir() if not path.name.startswith(".")}
    assert names == {"00001.parquet", "index.json", "rows"}
    assert Table(file, memory_efficient=True).text(19) == '"row"\n19, 猫'


@pytest.mark.parametrize("option", ["--num-shards=4", "--num_shards=4", "--rows-per-shard=5", "--rows_per_shard=5"])
def test_how_to_cut(tmp_path, option):
    done = run(option, make_table(tmp_path / "t.csv").name, cwd=tmp_path)
    assert done.stdout == "20 rows in 4 shards: t\n"
    assert [pa_parquet.read_metadata(path).num_rows for path in (tmp_path / "t").glob("*.parquet")] == [5] * 4


def test_a_killed_run_goes_on(tmp_path):
    file = make_table(tmp_path / "t.parquet", rows=30_000)
    folder = tmp_path / "t"
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(file), "--rows-per-shard", "600"])
    end = time.monotonic() + 240
    while not list(folder.glob("00003.parquet")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    index = ShardIndex.load(folder)
    assert 2 <= index.finished < 50
    kept = {shard["file"]: (folder / shard["file"]).stat().st_ino for shard in index.shards[: index.finished]}
    assert start(file).stdout == f"30,000 rows in 50 shards: {folder}\n"
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    sharded, plain = Table(folder), Table(file)
    assert sharded.fingerprint == plain.fingerprint
    assert all(sharded.text(row) == plain.text(row) for row in range(30_000))
    assert len(list(folder.glob("*.parquet"))) == 50 and not list(folder.glob(".*.part"))


def test_ctrl_c(tmp_path):
    file = make_table(tmp_path / "t.parquet", rows=30_000)
    command = [sys.executable, str(SCRIPT), str(file), "--rows-per-shard", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not list((tmp_path / "t").glob("00003.parquet")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert (process.returncode, said) == (
        130,
        "interrupted: the same command goes on after the last finished shard\n",
    )


MISTAKES = {
    "absent.csv": "table '.*absent.csv' does not exist",
    "t.txt": "table '.*t.txt' is a '.txt' file: a table is one .csv or .parquet file",
    "folder": "table '.*folder' is a folder",
    "empty.csv": "table '.*empty.csv' cannot be read as csv: Empty CSV file",
    "rowless.csv": "table '.*rowless.csv' has no rows",
    "broken.parquet": "table '.*broken.parquet' cannot be read as parquet",
    "captions.csv": r"no usable column num_frames, .*: add them with `python scripts/cnv/meta.py --input .*",
    "words.csv": r"no usable column fps \(not a number: 'fast'\)",
    "words.parquet": r"no usable column fps \(not a number: 'fast'\)",
    "twice.csv": "more than one column named 'text': rename one",
    "ragged.csv": "cannot be read as csv: .*Expected 8 columns, got 9",
    "held.csv": "folder '.*held' is being written by another run",
}


@pytest.fixture
def mistakes(tmp_path):
    (tmp_path / "t.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.csv").touch()
    make_table(tmp_path / "rowless.csv", rows=0)
    (tmp_path / "broken.parquet").write_text("PAR1")
    (tmp_path / "captions.csv").write_text("path,text\na.mp4,a\n")
    for suffix in (".csv", ".parquet"):
        make_table(tmp_path / f"words{suffix}", fps=["24"] * 19 + ["fast"])
    header, rest = make_table(tmp_path / "twice.csv").read_text().split("\n", 1)
    (tmp_path / "twice.csv").write_text(header.replace("path", "text") + "\n" + rest)
    make_table(tmp_path / "ragged.csv")
    with (tmp_path / "ragged.csv").open("a") as file:
        file.write("a,b,1,2,3,4,5,6,7\n")
    make_table(tmp_path / "held.csv")
    (tmp_path / "held").mkdir()
    with (tmp_path / "held/.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_for_a_mistake(mistakes, name):
    runner = start if name == "held.csv" else run  # a process is let into its own locks
    done = runner(mistakes / name)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert re.match(f"error: .*{MISTAKES[name]}", done.stderr)


@pytest.mark.parametrize("options", [["--num-shards", "0"], ["--num-shards", "x"], ["--num-shards", "2"] * 2])
def test_options_that_cannot_be_used(tmp_path, options):
    if options[1] == "2":
        options = [*options[:2], "--rows-per-shard", "2"]
    done = run(make_table(tmp_path / "t.csv"), *options)
    assert done.returncode == 2 and "error: argument" in done.stderr
    assert not (tmp_path / "t").exists()


def test_a_table_that_cannot_be_written(tmp_path):
    file = make_table(tmp_path / "t.csv")
    (tmp_path / "t").write_text("a file")
    done = run(file)
    assert done.returncode == 1 and done.stderr.startswith(
        f"error: folder '{tmp_path}/t' for the shards cannot be made"
    )


def test_a_full_disk(tmp_path):
    file = make_table(tmp_path / "t.parquet", rows=20_000)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))}
    done = start(file, "--num-shards", "10", **limit)
    assert (done.returncode, done.stderr) == (1, f"error: '{tmp_path}/t': File too large\n")
    assert 0 < ShardIndex.load(tmp_path / "t").finished < 10
    assert start(file).stdout == f"20,000 rows in 10 shards: {tmp_path}/t\n"
    assert Table(tmp_path / "t").text(19_999) == '"row"\n19999, 猫'


def test_a_table_that_grows_meanwhile(tmp_path):
    file = make_table(tmp_path / "t.csv", rows=50)

    def grow(done: int, total: int) -> None:
        if done == total:
            with file.open("a") as table:
                table.write("late.mp4,late,1,1,1,1,1,\n")

    with pytest.raises(ValueError, match="changed while it was read: run the command again"):
        write_shards(file, num_shards=5, progress=grow)
    assert write_shards(file, num_shards=5).rows == 51
    assert Table(tmp_path / "t").path(50) == "late.mp4"
