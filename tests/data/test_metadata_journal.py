"""What `add_metadata` has found is kept until the table is there, and a slow file holds up no other."""

import errno
import time
from pathlib import Path

import pandas as pd
import pytest

from opensora.data import metadata, probe_files
from opensora.data.metadata import add_metadata
from opensora.data.probe import VideoFacts
from opensora.data.probe_files import WorkerPool
from opensora.data.table_stream import CsvWriter, TableError

FACTS = VideoFacts(height=48, width=64, fps=24.0, num_frames=20)


@pytest.fixture
def table(tmp_path):
    """Of 100 files, which tests say how to read."""
    paths = [f"{i}.mp4" for i in range(100)]
    pd.DataFrame({"path": paths, "text": "a"}).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", [(CsvWriter, "__exit__"), (metadata, "put_in_place")])
def test_a_disk_that_is_full_at_the_end_costs_no_reading(table, tmp_path, monkeypatch, place):
    read, output = [], tmp_path / "out" / "out.csv"
    monkeypatch.setattr(probe_files, "probe", lambda path, verify: read.append(path) or FACTS)
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(OSError, match="No space left"):
            add_metadata(table, output, 0)
    assert len(read) == 100 and [path.name for path in output.parent.iterdir()] == [".out.csv.progress"]
    assert add_metadata(table, output, 0).written == 100
    assert len(read) == 100 and [path.name for path in output.parent.iterdir()] == ["out.csv"]
    assert (pd.read_csv(output).num_frames == 20).all()


def test_what_failed_is_tried_again_among_what_is_known(table, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora.data.probe_journal._READ_AT_ONCE", 7)
    read, failing = [], {"3.mp4", "6.mp4", "7.mp4", "40.mp4"}

    def read_some(path, verify):
        read.append(path)
        if path == "60.mp4" and failing:
            raise KeyboardInterrupt
        if path in failing:
            raise probe_files.MediaError(path, "cannot be read: away")
        return FACTS._replace(num_frames=int(Path(path).stem) + 1)

    monkeypatch.setattr(probe_files, "probe", read_some)
    with pytest.raises(KeyboardInterrupt):
        add_metadata(table, tmp_path / "out.csv", 0)
    again = sorted(failing, key=lambda name: int(Path(name).stem))
    read.clear()
    failing.clear()
    assert add_metadata(table, tmp_path / "out.csv", 0).written == 100
    assert read == [*again, *(f"{i}.mp4" for i in range(60, 100))]
    assert pd.read_csv(tmp_path / "out.csv").num_frames.tolist() == list(range(1, 101))


def test_other_chunks_are_read_while_a_file_does_not_answer(table, tmp_path, monkeypatch):
    """The first file is there when the last one is."""
    monkeypatch.setattr(metadata, "ROWS_PER_WORKER", 8)

    def read(path, verify):
        while path == "0.mp4" and not (tmp_path / "last").exists():
            time.sleep(0.01)
        if path == "99.mp4":
            (tmp_path / "last").touch()
        return FACTS._replace(num_frames=int(Path(path).stem) + 1)

    monkeypatch.setattr(probe_files, "probe", read)
    assert not add_metadata(table, tmp_path / "out.csv", 2, longest=30).rejected
    assert pd.read_csv(tmp_path / "out.csv").num_frames.tolist() == list(range(1, 101))


def test_so_many_items_are_taken_ahead_and_no_more(monkeypatch):
    monkeypatch.setattr(probe_files, "AHEAD", 50)
    taken = []
    pool = WorkerPool(lambda item: time.sleep(0.3 * (item == "0")) or item, 2, 60)
    try:
        results = pool.map(taken.append(i) or str(i) for i in range(1000))
        assert next(results) == "0" and len(taken) == 100
        assert list(results) == [str(i) for i in range(1, 1000)]
    finally:
        pool.close()


def test_a_disk_that_is_gone_ends_the_run(table, tmp_path, monkeypatch):
    """As if the kernel could not end the processes that wait for it."""
    monkeypatch.setattr(probe_files, "probe", lambda path, verify: time.sleep(60))
    monkeypatch.setattr(probe_files, "_SECONDS_TO_DIE", 0.0)
    made = []

    class Unkillable(probe_files._Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.process)
            self.process = _Deaf(self.process)

    monkeypatch.setattr(probe_files, "_Worker", Unkillable)
    try:
        with pytest.raises(OSError, match=r"^5 processes that were killed do not end: .* the same command goes on"):
            add_metadata(table, tmp_path / "out.csv", 1, longest=0.02)
        assert len(made) == 6 and (tmp_path / ".out.csv.progress").exists()
    finally:
        for process in made:
            process.kill()
            process.join()


class _Deaf:
    """A process that does not hear `kill`."""

    def __init__(self, process):
        self.process, self.join = process, process.join

    def kill(self) -> None:
        pass

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode


def test_a_table_of_which_no_row_can_be_used_leaves_only_the_list(table, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_files, "_probe_one", lambda path, folder, verify: "empty file")
    with pytest.raises(TableError, match=r"no row of .* can be used: 100 empty file"):
        add_metadata(table, tmp_path / "out.csv", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv.rejected.csv", "t.csv"]
