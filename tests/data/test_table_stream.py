import io
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from opensora.data.table_stream import TableError, create_table, open_table

TEXTS = [
    'a "quoted", cat',
    "two\nlines",
    "crlf\r\nline",
    "lone\rreturn",
    "ünï – 猫 🐈",
    " spaces ",
    "",
    "NA",
    "007",
    '"',
    ",",
]


def read(path, size=3, **options):
    """(all rows, what is malformed by row number)."""
    reader, rows, malformed, begin = open_table(path, **options), [], {}, 0
    for chunk in reader.chunks(size):
        assert len(chunk.rows) <= size
        malformed |= {begin + i: reason for i, reason in chunk.malformed.items()}
        begin += len(chunk.rows)
        rows += chunk.rows.to_pylist()
    assert len(rows) == reader.num_rows
    return rows, malformed


def test_csv_text_is_what_pandas_reads_and_stays_so_when_written(tmp_path):
    draw = random.Random(0)
    data = pd.DataFrame({name: [draw.choice(TEXTS) for _ in range(50)] for name in ("path", "text", "comma, name")})
    data.to_csv(tmp_path / "given.csv", index=False, quoting=1)
    reader = open_table(tmp_path / "given.csv")
    with create_table(tmp_path / "copy", reader.schema, ".csv") as writer:
        for chunk in reader.chunks(7):
            writer.write(chunk.rows)
    assert read(tmp_path / "given.csv")[0] == data.to_dict("records")
    copy = pd.read_csv(io.BytesIO((tmp_path / "copy").read_bytes()), dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(copy, data)


def test_a_plain_csv_is_copied_to_the_byte(tmp_path):
    text = 'path,text\na.mp4,"x, y"\nb.mp4,"say ""hi"""\nc.mp4,\n'
    (tmp_path / "given.csv").write_text(text)
    reader = open_table(tmp_path / "given.csv")
    with create_table(tmp_path / "copy", reader.schema, ".csv") as writer:
        for chunk in reader.chunks(2):
            writer.write(chunk.rows)
    assert (tmp_path / "copy").read_text() == text


def test_csv_with_byte_order_mark_blank_lines_and_crlf(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffpath,text\r\na,b\r\n\r\nc,d\r\n\r\n".encode())
    assert read(tmp_path / "t.csv") == ([{"path": "a", "text": "b"}, {"path": "c", "text": "d"}], {})


def test_rows_of_another_width_are_filled_up_or_told(tmp_path):
    (tmp_path / "t.csv").write_text("path,text\na\nb,c\nd,e,f\n")
    rows, malformed = read(tmp_path / "t.csv", size=2)
    assert rows == [{"path": "a", "text": ""}, {"path": "b", "text": "c"}, {"path": "d", "text": "e,f"}]
    assert malformed == {2: "malformed row: 3 fields where the header has 2"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["1", "-20", ""], [1, -20, None]),
        (["1", "2.5", "1e-3"], [1.0, 2.5, 0.001]),
        (["", "", ""], ["", "", ""]),
        (["1", "x", ""], ["1", "x", ""]),
        (["007", "1", "2"], ["007", "1", "2"]),
        (["1_000", "1", "2"], ["1_000", "1", "2"]),
        (["12345678901234567890", "1", "2"], ["12345678901234567890", "1", "2"]),
        (["1.5", "12345678901234567", "2"], ["1.5", "12345678901234567", "2"]),
    ],
)
def test_columns_of_numbers_are_parsed_where_nothing_is_lost(tmp_path, fields, expected):
    pd.DataFrame({"path": fields, "score": fields, "z": "z"}).to_csv(tmp_path / "t.csv", index=False)
    rows, _ = read(tmp_path / "t.csv", parse=True, keep_text=("path",))
    assert [row["score"] for row in rows] == expected
    assert [row["path"] for row in rows] == fields
    assert [row["score"] for row in read(tmp_path / "t.csv")[0]] == fields


def test_parquet_keeps_types_metadata_and_nulls(tmp_path):
    data = pd.DataFrame({"path": ["a", None, "c"], "n": np.array([1, 2, 3], np.int8), "tags": [["x"], [], None]})
    data.to_parquet(tmp_path / "given.parquet")
    reader = open_table(tmp_path / "given.parquet")
    with create_table(tmp_path / "copy", reader.schema, ".parquet") as writer:
        for chunk in reader.chunks(2):
            writer.write(chunk.rows)
    given, copy = (pa_parquet.read_table(tmp_path / name) for name in ("given.parquet", "copy"))
    assert copy.equals(given) and copy.schema.equals(given.schema, check_metadata=True)


def test_parquet_values_as_csv(tmp_path):
    rows = pa.table({"a": [1, None], "b": [0.1, 2.0], "c": ["x\ry", None], "d": [True, False]})
    with create_table(tmp_path / "t", rows.schema, ".csv") as writer:
        writer.write(rows)
    assert (tmp_path / "t").read_bytes() == b'a,b,c,d\n"1","0.1","x\ry","True"\n,2.0,,False\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it has no header line"),
        (b"path,path\na,b\n", "more than one column named 'path'"),
        (b'path,text\na,"open\nb,c\n', "a quote is not closed"),
        (b"path,text\na,caf\xe9\n", "is not UTF-8"),
    ],
)
def test_broken_csv_is_refused_before_a_row_is_read(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TableError, match=message) as raised:
        open_table(tmp_path / "t.csv")
    assert "t.csv" in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet")
    (tmp_path / "folder.csv").mkdir()
    for name, error, message in [
        ("absent.csv", FileNotFoundError, "does not exist"),
        ("t.json", TableError, "must end in .csv or .parquet"),
        ("t.parquet", TableError, "is not a parquet file"),
        ("folder.csv", TableError, "is not a file"),
    ]:
        with pytest.raises(error, match=message):
            open_table(tmp_path / name)
