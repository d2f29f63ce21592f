"""Copies of a table whose shards are there: who reads them whole, and how often."""

import os

import pytest

from opensora.data import shards
from opensora.data.records import Table
from opensora.data.shards import ShardIndex, write_shards

HEADER = "path,text,num_frames,height,width,aspect_ratio,resolution,fps\n"


@pytest.fixture
def table(tmp_path):
    """A table with shards, of another time since."""
    file = tmp_path / "t.csv"
    file.write_text(HEADER + "".join(f"{i}.mp4,text {i},20,48,64,0.75,3072,24\n" for i in range(20)))
    write_shards(file)
    os.utime(file, ns=(0, 0))
    return file


@pytest.fixture
def hashed(monkeypatch):
    """The tables that are read whole."""
    files, content_hash = [], shards.content_hash
    monkeypatch.setattr(shards, "content_hash", lambda file: files.append(file) or content_hash(file))
    return files


def test_the_first_rank_reads_a_copy_once(table, hashed, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert len(Table(table, memory_efficient=True)) == 20 and hashed == []
    monkeypatch.setenv("RANK", "0")
    for _ in range(3):
        assert len(Table(table, memory_efficient=True)) == 20
    assert hashed == [table] and ShardIndex.load(table.with_suffix("")).source["modified_ns"] == 0


def test_where_nothing_can_be_noted_it_is_read_again(table, hashed, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    before = ShardIndex.load(table.with_suffix(""))
    monkeypatch.setattr(shards, "hold", refuse)
    for _ in range(2):
        assert len(Table(table, memory_efficient=True)) == 20
    assert hashed == [table] * 2 and ShardIndex.load(table.with_suffix("")) == before


@pytest.mark.parametrize("rank", [0, 3])
def test_another_table_is_refused_and_read_at_most_once(table, hashed, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    content = table.read_text()
    table.write_text(content.replace("text 7", "text 9"))
    with pytest.raises(ValueError, match="has changed since its shards"):
        Table(table, memory_efficient=True)
    table.rename(table.with_suffix(".parquet"))
    with pytest.raises(ValueError, match=r"holds the shards of 't.csv', not of 't.parquet'"):
        Table(table.with_suffix(".parquet"), memory_efficient=True)
    assert hashed == []  # what differs in samples need not be
