import math
import os

import numpy as np
import pandas as pd
import pytest

from opensora.data import table_batches
from opensora.data.records import Table

TEXTS = ['a "quoted", cat', "two\nlines", "crlf\r\nline", "ünïcode – 猫 🐈", "  spaces  ", "123", "NA", "it's; a|t", ""]


def frame(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values()))) if columns else len(TEXTS)
    defaults = {
        "path": [f"clips/{i}.mp4" for i in range(n)],
        "text": (TEXTS * n)[:n],
        "num_frames": 33,
        "height": 256,
        "width": 512,
        "aspect_ratio": 0.5,
        "resolution": 256 * 512,
        "fps": 24.0,
    }
    return pd.DataFrame(defaults | columns, index=range(n))


def write(data: pd.DataFrame, path):
    if path.suffix.lower() == ".csv":
        data.to_csv(path, index=False)
    else:
        data.to_parquet(path)
    return path


@pytest.fixture(params=[".csv", ".parquet"])
def file(request, tmp_path):
    return tmp_path / f"table{request.param}"


def test_columns_are_read_and_text_survives(file):
    data = frame(num_frames=np.arange(1, 10), fps=np.linspace(10, 60, 9), score_vmafmotion=np.arange(9) / 4)
    table = Table(write(data, file))
    assert len(table) == 9
    assert [table.text(i) for i in range(9)] == TEXTS
    assert [table.path(i) for i in range(9)] == data.path.tolist()
    np.testing.assert_array_equal(table.num_frames, data.num_frames)
    np.testing.assert_array_equal(table.fps, data.fps)
    np.testing.assert_array_equal(table.score, data.score_vmafmotion)
    assert table.num_frames.dtype == table.height.dtype == table.width.dtype == np.int32
    assert not table.unusable
    assert isinstance(table.text(0), str)


def test_other_columns_and_their_order_do_not_matter(file):
    data = frame()
    data.insert(0, "extra, column", "x")
    assert Table(write(data[data.columns[::-1]], file)).fingerprint == Table(write(frame(), file)).fingerprint


def test_empty_captions_and_rates_are_legal(file):
    table = Table(write(frame(text=[None, math.nan, "", "nan"], fps=[None, math.nan, 0, 24]), file))
    assert [table.text(i) for i in range(4)] == [""] * 4
    np.testing.assert_array_equal(table.fps, [math.nan, math.nan, math.nan, 24])
    assert table.score is None


def test_columns_that_are_wholly_empty(file):
    table = Table(write(frame(text=[math.nan] * 3, fps=[math.nan] * 3), file))
    assert [table.text(i) for i in range(3)] == [""] * 3
    assert np.isnan(table.fps).all()


def test_unusable_rows_are_counted_by_reason(file):
    data = frame(
        path=["a", "b", None, "d", "e", "f"],
        num_frames=[1, math.nan, 1, 1, 1, 0],
        height=[10, 10, 10, -4, math.inf, 10],
        width=[10, 10, 10, 10, 10, 10],
    )
    table = Table(write(data, file))
    assert table.num_frames.tolist() == [1, 0, 0, 0, 0, 0]
    assert table.unusable == {
        "path is empty": 1,
        "num_frames is empty or not positive": 2,
        "height is empty or not positive": 2,
    }


def test_one_error_names_all_absent_columns_and_the_command(file):
    write(frame()[["path", "text", "height"]], file)
    with pytest.raises(ValueError) as error:
        Table(file)
    message = str(error.value)
    assert "\n" not in message
    for name in ("num_frames", "width", "aspect_ratio", "resolution", "fps"):
        assert name in message.split("python scripts")[0]
    assert "height" not in message
    output = file.with_name(f"table_nec{file.suffix}")
    assert f"`python scripts/cnv/meta.py --input {file} --output {output}`" in message


def test_columns_without_numbers_are_named_with_a_value(file):
    data = frame(height=["12", "tall"], fps=["24 fps", "24 fps"], num_frames=[3, None]).drop(columns="width")
    named = r"height \(not a number: 'tall'\), width, fps \(not a number: '24 fps'\)"
    with pytest.raises(ValueError, match=named) as error:
        Table(write(data, file))
    assert "num_frames" not in str(error.value)


def test_path_and_text_are_required(file):
    with pytest.raises(ValueError, match=r"column text: a table of videos needs text$"):
        Table(write(frame().drop(columns="text"), file))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_path='.*absent.csv' does not exist"):
        Table(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="is a folder"):
        Table(tmp_path)
    contents = {"a.txt": b"x", "b.csv": b"", "c.parquet": b"PAR1", "d.csv": b"path,text\na\n", "e": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            Table(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_table_without_rows(file):
    with pytest.raises(ValueError, match="has no rows"):
        Table(write(frame()[:0], file))


def test_byte_order_mark_and_upper_case_suffix(tmp_path):
    frame().to_csv(tmp_path / "TABLE.CSV", index=False, encoding="utf-8-sig")
    assert Table(tmp_path / "TABLE.CSV").text(0) == TEXTS[0]


def test_rows_longer_than_a_megabyte(tmp_path):
    text = 'long "text",\n' * 200_000
    assert Table(write(frame(text=["a", text]), tmp_path / "t.csv")).text(1) == text


@pytest.mark.parametrize("place", [0, 50, 99])
def test_rows_longer_than_the_blocks_that_a_csv_is_read_in(tmp_path, monkeypatch, place):
    monkeypatch.setattr(table_batches, "_CSV_BLOCK_BYTES", (1 << 10, 1 << 13))
    data = frame(text=[f'{i} "{"x" * 300}"\n' for i in range(100)])
    data.loc[place, "text"] = "long, " * 1000
    table = Table(write(data, tmp_path / "t.csv"))
    assert [table.text(i) for i in range(100)] == data.text.tolist()
    np.testing.assert_array_equal(table.num_frames, data.num_frames)
    data.loc[place, "text"] *= 10
    with pytest.raises(ValueError, match=r"cannot be read as csv: .* block") as error:
        Table(write(data, tmp_path / "t.csv"))
    assert "\n" not in str(error.value)


def test_relative_paths_start_at_the_working_directory_then_at_the_table(tmp_path, monkeypatch):
    folder, work = tmp_path / "data", tmp_path / "work"
    for place in (folder, work):
        place.mkdir()
    (folder / "both.mp4").touch()
    (work / "both.mp4").touch()
    (folder / "beside.mp4").touch()
    monkeypatch.chdir(work)
    paths = ["both.mp4", "beside.mp4", "nowhere.mp4", str(folder / "x.mp4"), "s3://bucket/x.mp4"]
    table = Table(write(frame(path=paths), folder / "t.csv"))
    expected = ["both.mp4", str(folder / "beside.mp4"), "nowhere.mp4", str(folder / "x.mp4"), "s3://bucket/x.mp4"]
    assert [table.path(i) for i in range(5)] == expected
    relative = os.path.relpath(folder / "t.csv", work)
    assert os.path.exists(Table(relative).path(1))


def test_fingerprint_is_of_the_content_that_plans_depend_on(tmp_path):
    base = frame(fps=[24.0, math.nan, 30.0])
    csv = Table(write(base, tmp_path / "a.csv")).fingerprint
    assert Table(write(base, tmp_path / "b.parquet")).fingerprint == csv
    assert Table(write(base.assign(text="other", path="other"), tmp_path / "c.csv")).fingerprint == csv
    for column in ("num_frames", "height", "width", "fps"):
        changed = base.copy()
        changed.loc[2, column] = 7
        assert Table(write(changed, tmp_path / "d.csv")).fingerprint != csv
    assert Table(write(base[:2], tmp_path / "e.csv")).fingerprint != csv


def test_the_folder_of_relative_paths_is_found_beside_absolute_ones(tmp_path, monkeypatch):
    paths = ["/videos/a.mp4", "", "s3://videos/b.mp4", "sub/c.mp4"]
    table = write(frame(path=paths), tmp_path / "t.csv")
    monkeypatch.chdir(tmp_path)
    assert Table(table).origin == str(tmp_path)
    assert Table(write(frame(path=[*paths[:3], "/d.mp4"]), table)).origin == ""
