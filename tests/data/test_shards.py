"""Tables in shards against the same tables read plainly by pandas and pyarrow."""

import math
import os
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from opensora.data.bucket import BucketTable
from opensora.data.loader import build_loader
from opensora.data.records import Table
from opensora.data.sampler import BucketSampler
from opensora.data.shards import ShardIndex, write_shards
from opensora.fingerprint import SAMPLE_BYTES, sample_hash
from opensora.registry import DATASETS

TEXTS = [
    'a "quoted", cat',
    "two\nlines",
    "crlf\r\nline",
    "ünïcode – 猫 🐈",
    "  spaces  ",
    "123",
    "NA",
    "nan",
    "it's|t",
    "",
]


def frame(rows: int) -> pd.DataFrame:
    draw = np.random.default_rng(rows)
    height, width = draw.integers(100, 900, (2, rows))
    return pd.DataFrame(
        {
            "path": [f"clips/{i}.mp4" for i in range(rows)],
            "id": [f"00{i}" for i in range(rows)],
            "text": [f"{TEXTS[i % len(TEXTS)]}{i if i % 3 else ''}" for i in range(rows)],
            "num_frames": draw.integers(1, 200, rows),
            "height": height,
            "width": width,
            "aspect_ratio": height / width,
            "resolution": height * width,
            "fps": np.where(draw.random(rows) < 0.3, np.nan, draw.uniform(10, 60, rows)),
        }
    )


def write(data: pd.DataFrame, file: Path, **options) -> Path:
    if file.suffix == ".csv":
        data.to_csv(file, index=False)
    else:
        data.to_parquet(file, **options)
    return file


def assert_equal(sharded: Table, plain: Table) -> None:
    assert len(sharded) == len(plain) and sharded.fingerprint == plain.fingerprint
    for name in ("num_frames", "height", "width", "fps", "score"):
        ours, expected = getattr(sharded, name), getattr(plain, name)
        np.testing.assert_array_equal(ours, expected)
        assert expected is None or ours.dtype == expected.dtype
    assert sharded.unusable == plain.unusable
    rows = range(len(plain))
    assert [sharded.text(i) for i in rows] == [plain.text(i) for i in rows]
    assert [sharded.path(i) for i in rows] == [plain.path(i) for i in rows]


@pytest.fixture(params=[".csv", ".parquet"])
def file(request, tmp_path):
    return tmp_path / f"table{request.param}"


@pytest.mark.parametrize("cut", [{}, {"num_shards": 1}, {"num_shards": 7}, {"rows_per_shard": 10}, {"num_shards": 999}])
def test_nothing_is_lost(file, cut):
    data = frame(60)
    index = write_shards(write(data, file), **cut)
    table = Table(file, memory_efficient=True)
    assert [table.text(i) for i in range(60)] == ["" if text == "nan" else text for text in data.text]
    assert [table.path(i) for i in range(60)] == data.path.tolist()
    assert_equal(table, Table(file))
    assert_equal(Table(file.with_suffix("")), Table(file))

    shards = sorted(file.with_suffix("").glob("*.parquet"))
    sizes = [pa_parquet.read_metadata(shard).num_rows for shard in shards]
    assert [shard.name for shard in shards] == [f"{i:05}.parquet" for i in range(1, len(shards) + 1)]
    expected = {"num_shards": min(60, cut.get("num_shards", 1)), "rows_per_shard": 6}
    assert len(shards) == expected["rows_per_shard" if "rows_per_shard" in cut else "num_shards"]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 60
    assert [(shard["first_row"], shard["rows"]) for shard in index.shards] == list(
        zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)
    )
    again = pd.concat([pd.read_parquet(shard) for shard in shards], ignore_index=True)
    if file.suffix == ".csv":
        again = again.astype(dict.fromkeys(("num_frames", "height", "width", "resolution"), int))
    pd.testing.assert_frame_equal(again, data)
    assert not list(file.with_suffix("").glob("*.part"))


def test_types_and_metadata_of_parquet_are_kept_and_row_groups_do_not_matter(tmp_path):
    data = frame(50).assign(tags=[["a", None]] * 50, when=pd.Timestamp("2024-01-02"), kind=pd.Categorical(["x"] * 50))
    file = write(data.astype({"fps": "float32", "height": "int16"}), tmp_path / "t.parquet", row_group_size=7)
    write_shards(file, rows_per_shard=9)
    source = pa_parquet.read_table(file)
    shards = [pa_parquet.read_table(shard) for shard in sorted((tmp_path / "t").glob("*.parquet"))]
    assert pa.concat_tables(shards).equals(source) and shards[0].schema.equals(source.schema, check_metadata=True)
    assert_equal(Table(tmp_path / "t"), Table(file))


strings = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
numbers = st.one_of(st.none(), st.floats(allow_nan=True, width=32), st.integers(-3, 3000).map(float))


@given(
    rows=st.lists(st.tuples(strings, strings, numbers, numbers, numbers, numbers), min_size=1, max_size=30),
    rows_per_shard=st.integers(1, 31),
    group=st.integers(1, 31),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_and_numbers(tmp_path, rows, rows_per_shard, group):
    names = ["path", "text", "num_frames", "height", "width", "fps"]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    columns |= {"aspect_ratio": [1.0] * len(rows), "resolution": [1.0] * len(rows), "score_vmafmotion": columns["fps"]}
    types = {name: pa.string() if name in ("path", "text") else pa.float64() for name in columns}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    pa_parquet.write_table(table, tmp_path / "any.parquet", row_group_size=group)
    write_shards(tmp_path / "any.parquet", rows_per_shard=rows_per_shard)
    sharded = Table(tmp_path / "any", memory_efficient=True)
    assert [sharded._rows.path(i) for i in range(len(rows))] == [row[0] or "" for row in rows]
    assert [sharded._rows.text(i) for i in range(len(rows))] == [row[1] or "" for row in rows]
    for i, (path, _, *sizes, fps) in enumerate(rows):
        usable = bool(path) and all(size is not None and 1 <= size < 2**31 for size in sizes)
        expected = [int(size) for size in sizes] if usable else [0, 0, 0]
        assert [sharded.num_frames[i], sharded.height[i], sharded.width[i]] == expected
        known = fps is not None and math.isfinite(fps) and fps > 0
        np.testing.assert_equal(float(sharded.fps[i]), fps if known else math.nan)
        np.testing.assert_equal(float(sharded.score[i]), math.nan if fps is None else fps)
    assert_equal(sharded, Table(tmp_path / "any.parquet"))


class Stop(Exception):
    pass


def stop_after(rows: int):
    def progress(done: int, total: int) -> None:
        if done >= rows:
            raise Stop

    return progress


@pytest.mark.parametrize("done", [0, 5, 20, 47, 60])
def test_an_interrupted_run_goes_on(file, tmp_path, done):
    write(frame(60), file)
    reference = tmp_path / "reference"
    reference.mkdir()
    write_shards(Path(shutil.copy2(file, reference / file.name)), rows_per_shard=10)
    folder = file.with_suffix("")
    with pytest.raises(Stop):
        write_shards(file, rows_per_shard=10, progress=stop_after(done))
    finished = {path.name: path.stat().st_ino for path in folder.glob("0*.parquet")}
    assert len(finished) == ShardIndex.load(folder).finished == max(0, done - 1) // 10
    for path in (folder, file):
        with pytest.raises(ValueError, match=rf"has {len(finished)} of 6 shards: finish them with .*shard.py"):
            Table(path, memory_efficient=True)
    for name in (
        os.listdir(folder / "rows") if done else ()
    ):  # a crash may leave anything after what the index vouches for
        with (folder / "rows" / name).open("ab") as rest:
            rest.write(b"rest")
    seen = []
    write_shards(file, progress=lambda now, total: seen.append(now))
    assert seen[0] == 10 * len(finished) and seen[-1] == 60
    assert {name: (folder / name).stat().st_ino for name in finished} == finished
    same = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert same == sorted(
        str(p.relative_to(reference / "table")) for p in (reference / "table").rglob("*") if p.is_file()
    )
    for name in same:
        assert (folder / name).read_bytes() == (reference / "table" / name).read_bytes()


def test_a_second_run_does_nothing_and_another_cut_starts_anew(file):
    folder = file.with_suffix("")
    write_shards(write(frame(40), file), num_shards=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock" and path.is_file()}
    for same in ({}, {"num_shards": 4}, {"rows_per_shard": 10}):
        write_shards(file, **same)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    running = Table(folder)
    text, num_frames = running.text(39), running.num_frames.copy()
    write_shards(file, num_shards=2)
    assert sorted(path.name for path in folder.glob("*.parquet")) == ["00001.parquet", "00002.parquet"]
    assert running.text(39) == text and (running.num_frames == num_frames).all()  # a run that goes on is not hurt


def test_a_table_that_changed(file):
    write_shards(write(frame(40), file))
    os.utime(file, ns=(0, 0))
    assert len(Table(file, memory_efficient=True)) == 40  # a copy has another time
    write(frame(41), file)
    with pytest.raises(
        ValueError, match=r"has changed since its shards .* make them anew with `python scripts/cnv/shard"
    ):
        Table(file, memory_efficient=True)
    write_shards(file)
    assert_equal(Table(file, memory_efficient=True), Table(file))
    file.unlink()
    assert len(Table(file, memory_efficient=True)) == 41  # the shards are enough


def test_an_edit_anywhere_is_noticed(tmp_path):
    """Of one byte, in a table of 8 MB of which samples alone would not show it."""
    data = frame(40).assign(text=[f"{i:05}" * 40_000 for i in range(40)])
    table = write(data, tmp_path / "t.csv")
    write_shards(table, num_shards=2)
    content = bytearray(table.read_bytes())
    place = next(i for i in range(SAMPLE_BYTES + 10, len(content)) if chr(content[i]) == "0")
    content[place] = ord("1")
    before = sample_hash(table)
    table.write_bytes(content)
    assert sample_hash(table) == before
    with pytest.raises(ValueError, match="has changed since its shards"):
        Table(table, memory_efficient=True)
    write_shards(table)
    assert_equal(Table(table, memory_efficient=True), Table(table))


def test_a_copy_is_read_whole_once(tmp_path, monkeypatch):
    table = write(frame(40), tmp_path / "t.csv")
    write_shards(table, num_shards=2)
    os.utime(table, ns=(0, 0))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.parquet")}
    assert write_shards(table).source["modified_ns"] == 0
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    monkeypatch.setattr("opensora.data.shards.content_hash", lambda path: pytest.fail("is read whole"))
    assert len(Table(table, memory_efficient=True)) == 40


def test_tables_that_differ_in_their_suffix_do_not_share_a_folder(tmp_path):
    csv, parquet = write(frame(40), tmp_path / "two.csv"), write(frame(30), tmp_path / "two.parquet")
    write_shards(csv)
    for attempt in (lambda: Table(parquet, memory_efficient=True), lambda: write_shards(parquet)):
        with pytest.raises(ValueError, match=r"two' holds the shards of 'two.csv', not of 'two.parquet': rename one"):
            attempt()
    assert_equal(Table(csv, memory_efficient=True), Table(csv))
    csv.rename(tmp_path / "other.csv")
    (tmp_path / "two").rename(tmp_path / "other")
    assert len(Table(tmp_path / "other.csv", memory_efficient=True)) == 40  # under another name, but the same


@pytest.mark.parametrize("harm", ["rows/strings.utf8", "rows/height.int32", "rows/ends.int64", "00002.parquet"])
def test_damaged_shards(file, harm):
    write_shards(write(frame(40), file), num_shards=2)
    target = file.with_suffix("") / harm
    if harm.endswith("parquet"):
        target.unlink()  # training does not read it
    else:
        target.write_bytes(target.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"are damaged \({harm} has .* bytes instead of .*\): make them anew"):
            Table(file, memory_efficient=True)
    write_shards(file, num_shards=2)
    assert target.exists()
    assert_equal(Table(file, memory_efficient=True), Table(file))


def test_a_folder_of_videos_may_have_the_same_name(file):
    folder = file.with_suffix("")
    folder.mkdir()
    (folder / "clip.mp4").write_text("video")
    with pytest.raises(ValueError, match="is a folder without shards"):
        Table(folder)
    write_shards(write(frame(5), file))
    assert (folder / "clip.mp4").read_text() == "video" and len(Table(folder)) == 5
    write_shards(write(frame(6), file))
    assert (folder / "clip.mp4").read_text() == "video" and len(Table(folder)) == 6


@pytest.mark.parametrize("name", ["00001.parquet", "index.json", "rows"])
def test_files_of_another_origin_are_left_alone(file, name):
    folder = file.with_suffix("")
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"folder '.*' holds {name}, which is of another origin"):
        write_shards(write(frame(5), file))
    assert (folder / name).read_text() == "{}"


def test_any_spelling_of_the_path(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    file = write(frame(5), tmp_path / "data" / "x.v2.parquet")
    monkeypatch.chdir(tmp_path / "data")
    write_shards(Path("./x.v2.parquet"))
    for spelling in (
        "x.v2.parquet",
        "./x.v2.parquet",
        "../data/x.v2.parquet",
        str(file),
        "x.v2.parquet/",
        "./x.v2/",
        "x.v2",
    ):
        assert Table(spelling, memory_efficient=True).text(1) == Table(file).text(1)
        assert Table(spelling).text(1) == Table(file).text(1)


def test_relative_paths_start_at_the_working_directory_then_at_the_table(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (folder / "beside.mp4").touch()
    file = write(frame(2).assign(path=["beside.mp4", "nowhere.mp4"]), folder / "t.csv")
    write_shards(file)
    for table in (Table(file, memory_efficient=True), Table(folder / "t")):
        assert [table.path(0), table.path(1)] == [str(folder / "beside.mp4"), "nowhere.mp4"]


def test_without_shards(file):
    write(frame(5), file)
    with pytest.raises(FileNotFoundError, match=f"make them with `python scripts/cnv/shard.py {file}`") as error:
        Table(file, memory_efficient=True)
    assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist, nor do its shards"):
        Table(file, memory_efficient=True)


def test_rows_are_within_the_table(file):
    write_shards(write(frame(5), file))
    table = Table(file, memory_efficient=True)
    for row in (-1, 5):
        with pytest.raises(IndexError, match=f"row {row} of a table of 5"):
            table.text(row)


def send_texts(table: Table, rows: list[int], sender) -> None:
    sender.send([table.text(row) for row in rows])


def test_forked_workers_share_the_files(file):
    write_shards(write(frame(500), file), num_shards=3)
    table, context = Table(file, memory_efficient=True), get_context("fork")
    rows = [np.random.default_rng(worker).integers(0, 500, 2000).tolist() for worker in range(3)]
    pipes = [context.Pipe(duplex=False) for _ in rows]
    workers = [
        context.Process(target=send_texts, args=(table, part, sender))
        for part, (_, sender) in zip(rows, pipes, strict=True)
    ]
    for worker in workers:
        worker.start()
    plain = Table(file)
    for part, (receiver, _) in zip(rows, pipes, strict=True):
        assert receiver.recv() == [plain.text(row) for row in part]
    for worker in workers:
        worker.join()


def test_training_is_the_same_over_epochs(tmp_path):
    """The batches of two epochs, with workers."""
    sizes = [(64, 96), (96, 64), (80, 80)]
    rows = []
    for i in range(18):
        height, width = sizes[i % 3]
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append((f"{i}.png", TEXTS[i % len(TEXTS)], 1, height, width, height / width, height * width, None))
    names = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]
    file = write(pd.DataFrame(rows, columns=names), tmp_path / "images.csv")
    write_shards(file, num_shards=4)

    def batches(**options) -> list:
        dataset = DATASETS.build({"type": "video_text", "fps_max": 24} | options)
        sampler = BucketSampler(dataset.table, BucketTable({"64px": {1: (0.9, 2)}}, 24), seed=3, epochs=2)
        return list(build_loader(dataset, sampler, num_workers=1))

    expected = batches(data_path=str(file))
    assert len(expected) > 8 and {batch.epoch for batch in expected} == {0, 1}
    for options in ({"data_path": str(file), "memory_efficient": True}, {"data_path": str(tmp_path / "images")}):
        for ours, batch in zip(batches(**options), expected, strict=True):
            assert (ours.text, ours.index, ours.seed, ours.epoch) == (batch.text, batch.index, batch.seed, batch.epoch)
            assert ours.video.equal(batch.video)


PEAK = """
import sys
from pathlib import Path
from opensora.data.shards import write_shards
write_shards(Path(sys.argv[1]), rows_per_shard=20000)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
"""


def peak_mib(file: Path) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("file", [pytest.param(".csv", marks=pytest.mark.slow), ".parquet"], indirect=True)
def test_memory_does_not_grow_with_the_table(file):
    text, peaks = "".join(map(chr, range(300, 1300))), []
    for rows in (20_000, 80_000):  # the larger one: 160 MB of text
        numbers = dict.fromkeys(["num_frames", "height", "width", "aspect_ratio", "resolution", "fps"], np.ones(rows))
        table = pa.table({"path": ["a"] * rows, "text": [f"{i} {text}" for i in range(rows)], **numbers})
        target = file.with_name(f"{rows}{file.suffix}")
        if file.suffix == ".csv":
            pa_csv.write_csv(table, target)
        else:
            pa_parquet.write_table(table, target)
        peaks.append(peak_mib(target))
    assert peaks[1] - peaks[0] < 60
