"""A cache gives back what was put in, whoever wrote it, and picks windows as the sample's numbers say."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.cache import (
    Cache,
    NotCachedError,
    ShardWriter,
    begin,
    complete,
    entry_key,
    lock,
    read_description,
    stored_keys,
    text_key,
    without_entry,
)
from opensora.data.cache_clips import ClipWindows, clip_requests
from opensora.data.cache_index import Key, KeyIndex, KeySet, file_mark, write_index
from opensora.data.frame_rate import map_target_fps, sampling_intervals
from opensora.data.video import window_indices

DESCRIPTION = {"made_with": {"dtype": "torch.bfloat16"}, "covers": {}}


def entry(number: int, frames: int = 2) -> dict[str, torch.Tensor]:
    tensor = torch.full((3, frames, 4), number, dtype=torch.bfloat16)
    return {"latents": tensor, "head_1": tensor[:, :1].clone() + 1}


def write(folder, numbers, shard_bytes=200, frames=lambda number: 2):
    writer = ShardWriter(folder, shard_bytes)
    for number in numbers:
        writer.add(entry_key("entry", number), entry(number, frames(number)))
    writer.flush()


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_entries_come_back_from_shards_of_several_writers(tmp_path):
    begin(tmp_path, DESCRIPTION)
    frames = lambda number: 1 + number // 20  # noqa: E731
    for first in range(3):
        write(tmp_path, [0, *range(first, 60, 3)], frames=frames)  # entry 0 by all
    assert complete(tmp_path, DESCRIPTION, [entry_key("entry", 100)]) == 60
    cache = Cache(tmp_path, "cached_video")
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert same(cache.get(entry_key("entry", number)), entry(number, frames(number)))
    assert cache.get(entry_key("entry", 100)) is None and entry_key("entry", 100) in cache
    with pytest.raises(NotCachedError, match=r"cached_video=.*is stale.*cache.py"):
        cache.get(entry_key("entry", 61))


def test_keys_of_equal_first_halves_are_told_apart(tmp_path):
    writer = ShardWriter(tmp_path)
    keys = [type(text_key(""))(7, low) for low in (5, -3, 9)]
    for number, key in enumerate(keys):
        writer.add(key, entry(number))
    writer.flush()
    complete(tmp_path, DESCRIPTION, [])
    cache = Cache(tmp_path, "cached_video")
    assert all(same(cache.get(key), entry(number)) for number, key in enumerate(keys))
    assert type(keys[0])(7, 6) not in cache


def test_what_was_not_written_to_the_end_is_not_there(tmp_path):
    begin(tmp_path, DESCRIPTION)
    write(tmp_path, range(5))
    stopped = tmp_path / "shards/.half.safetensors.1234"
    stopped.write_bytes(b"\0" * 10)
    with pytest.raises(FileNotFoundError, match="is not complete"):
        Cache(tmp_path, "cached_video")
    begin(tmp_path, {"made_with": {"dtype": "other"}, "covers": {}})  # the first description stays
    assert not stopped.exists() and read_description(tmp_path)["made_with"] == DESCRIPTION["made_with"]
    stored = stored_keys(tmp_path)
    assert [entry_key("entry", number) in stored for number in range(7)] == [True] * 5 + [False] * 2
    write(tmp_path, range(5, 7))
    assert complete(tmp_path, DESCRIPTION, []) == 7


def test_an_older_index_serves_until_the_new_one_is_there(tmp_path):
    write(tmp_path, range(5))
    complete(tmp_path, DESCRIPTION, [])
    begin(tmp_path, DESCRIPTION)
    write(tmp_path, range(5, 30))
    cache = Cache(tmp_path, "cached_video")
    assert same(cache.get(entry_key("entry", 4)), entry(4)) and entry_key("entry", 6) not in cache
    complete(tmp_path, DESCRIPTION, [])
    assert len(list(tmp_path.glob("index-*.npy"))) == 1
    assert same(Cache(tmp_path, "cached_video").get(entry_key("entry", 29)), entry(29))
    assert same(cache.get(entry_key("entry", 3)), entry(3))  # a run that goes on with the old one


def test_no_cache_and_another_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no cache"):
        Cache(tmp_path, "cached_text")
    write(tmp_path, [1])
    complete(tmp_path, DESCRIPTION, [])
    file = tmp_path / "cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Cache(tmp_path, "cached_text")


def read_all(cache, results):
    results.put([cache.get(entry_key("entry", number))["latents"].flatten()[0].item() for number in range(30)])


def test_forked_readers_share_a_cache(tmp_path):
    write(tmp_path, range(30))
    complete(tmp_path, DESCRIPTION, [])
    cache = Cache(tmp_path, "cached_video")
    cache.get(entry_key("entry", 0))  # a shard is open when they fork
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    readers = [fork.Process(target=read_all, args=(cache, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=120) for _ in readers] == [list(range(30))] * 2
    for reader in readers:
        reader.join()


@given(st.lists(st.text(max_size=40), max_size=20, unique=True))
@settings(max_examples=50, deadline=None)
def test_texts_have_keys_of_their_own(texts):
    assert len({text_key(text) for text in texts}) == len(texts)
    assert all(text_key(text) != entry_key("clip", text) for text in texts)


class Files:
    """What `ClipWindows` needs of a table."""

    def __init__(self, lengths, fps=24.0):
        self.num_frames, self.fps = np.array(lengths), np.full(len(lengths), fps)
        self.height, self.width = np.full((2, len(lengths)), 64)

    def listed_path(self, row):
        return f"{row}.mp4"


@given(st.integers(5, 400), st.sampled_from([5, 33]), st.sampled_from([24.0, 48.0, 10.0]), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_windows_are_distinct_and_spread_over_the_file(total, num_frames, fps, at_most):
    if total < num_frames:
        return
    windows = ClipWindows(Files([total], fps), 24, at_most)
    interval, size = int(fps // 24) or 1, (num_frames, 64, 64)
    count = windows.count(0, num_frames)
    begins = [window_indices(total, num_frames, interval, windows.window(0, size, nth).u)[0] for nth in range(count)]
    possible = {int(window_indices(total, num_frames, interval, u)[0]) for u in np.arange(0, 1, 1 / 1024)}
    assert count == min(at_most, len(possible)) and len(set(begins)) == count and set(map(int, begins)) <= possible
    for first, nth in zip(begins, range(count), strict=True):  # one in each part of the file
        assert int(nth / count * len(possible)) <= first <= int((nth + 1) / count * len(possible))


def test_windows_are_counted_by_column_as_one_by_one():
    rng = np.random.default_rng(0)
    files = Files(rng.integers(1, 300, 500), 24.0)
    files.fps = rng.choice([24.0, 60.0, 12.5, 47.95, np.nan], 500)
    for fps_max, at_most in ((24, 3), (None, 1), (12, 50)):
        windows, rows = ClipWindows(files, fps_max, at_most), np.arange(0, 500, 3, dtype=np.int32)
        assert windows.count_all(rows, 17) == sum(windows.count(row, 17) for row in rows.tolist())


def test_a_sample_draws_every_window_alike():
    windows, size = ClipWindows(Files([100]), None, 4), (5, 64, 64)
    keys = [windows.window(0, size, nth).key for nth in range(4)]
    drawn = [windows.draw(0, size, u) for u in np.linspace(0, 1, 400, endpoint=False)]
    assert [drawn.count(key) for key in keys] == [100] * 4


def test_a_key_is_of_the_file_and_the_clip_not_of_the_row():
    first, second = Files([50, 60]), Files([60, 50])
    second.listed_path = lambda row: f"{1 - row}.mp4"
    for size, nth in itertools.product([(5, 64, 64), (9, 64, 64), (5, 64, 48)], range(2)):
        ours, theirs = (ClipWindows(table, 24, 2) for table in (first, second))
        assert ours.window(0, size, nth) == theirs.window(1, size, nth)
        assert ours.window(0, size, nth) != theirs.window(0, size, nth)
    assert ClipWindows(first, 24, 2).window(0, (5, 64, 64), 0) != ClipWindows(first, 12, 2).window(0, (5, 64, 64), 0)
    before = ClipWindows(first, 24, 2).window(0, (5, 64, 64), 0)
    first.height = first.height * 2  # another file of the same name
    assert ClipWindows(first, 24, 2).window(0, (5, 64, 64), 0) != before


def test_one_run_at_a_time_fills_a_cache(tmp_path):
    holds = (
        "import sys, time; from pathlib import Path; from opensora.data.cache import lock;"
        " held = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path / "video")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="is being written by another run"):
            lock(tmp_path / "video")
    finally:
        other.kill()
        other.wait()
    lock(tmp_path / "video").close()


def test_requests_leave_out_what_is_done():
    windows, size = ClipWindows(Files([5, 50, 50, 5]), 24, 3), (5, 64, 64)
    every = [
        request for batch in clip_requests(windows, size, np.arange(4), 3, lambda row, key: False) for request in batch
    ]
    assert [request.row for request in every] == [0, 1, 1, 1, 2, 2, 2, 3]
    done = {request.window.key for request in every[::2]}
    batches = list(clip_requests(windows, size, np.arange(4), 3, lambda row, key: key in done))
    assert [len(batch) for batch in batches] == [3, 1]
    assert [request for batch in batches for request in batch] == every[1::2]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 2), st.integers(0, 9)), max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_an_index_is_sorted_in_parts_as_a_dictionary_would_have_it(tmp_path_factory, rows, at_once):
    """Keys all over their range, many of them more than once; sorted a few at a time."""
    rows = [(high * (2**61) + 5 * high, low, place, place) for high, low, place in rows]
    expected = {}
    for high, low, place, _ in rows:
        expected[high, low] = max(place, expected.get((high, low), 0))
    file = tmp_path_factory.mktemp("index") / "index.npy"
    pieces = [np.array(rows[:7], dtype=np.int64).reshape(-1, 4), np.array(rows[7:], dtype=np.int64).reshape(-1, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opensora.data.cache_index._SORTED_AT_ONCE", at_once)
        patch.setattr("opensora.data.cache_index._READ_AT_ONCE", 3)
        write_index(file, pieces)
    index = KeyIndex.load(file)
    assert dict(zip(zip(index.highs.tolist(), index.lows.tolist(), strict=True), index.places, strict=True)) == expected
    assert list(zip(index.highs.tolist(), index.lows.tolist(), strict=True)) == sorted(expected)
    assert all(index.mark(Key(*key)) == place for key, place in expected.items())
    assert Key(1, 99) not in index and os.listdir(file.parent) == ["index.npy"]


@given(st.lists(st.lists(st.integers(-9, 9), max_size=6), max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_set_of_keys_has_what_was_added(batches):
    ours, theirs = KeySet(), set()
    for batch in batches:
        ours.add([Key(number, -number) for number in batch])
        theirs.update(batch)
        assert all((Key(number, -number) in ours) == (number in theirs) for number in range(-10, 11))


def test_an_entry_is_of_a_file_as_it_was(tmp_path):
    file, key = tmp_path / "a.mp4", entry_key("entry", 1)
    file.write_bytes(b"first")
    begin(tmp_path / "cache", DESCRIPTION)
    writer = ShardWriter(tmp_path / "cache")
    writer.add(key, entry(1), file_mark(str(file)))
    writer.flush()
    complete(tmp_path / "cache", DESCRIPTION, [])
    cache = Cache(tmp_path / "cache", "cached_video")
    assert same(cache.get(key, str(file)), entry(1))
    assert same(cache.get(key, "s3://videos/a.mp4"), entry(1))  # of those nothing is known
    file.write_bytes(b"other")  # as long as the first
    os.utime(file, ns=(1, 1))
    with pytest.raises(NotCachedError, match=r"cached_video=.*is stale: '.*a.mp4' has changed .*run scripts/cnv/cache"):
        cache.get(key, str(file))

    begin(tmp_path / "cache", DESCRIPTION)  # it is encoded anew, and the newer entry counts
    writer.add(key, entry(2), file_mark(str(file)))
    writer.flush()
    assert complete(tmp_path / "cache", DESCRIPTION, []) == 1
    assert same(Cache(tmp_path / "cache", "cached_video").get(key, str(file)), entry(2))
    file.unlink()
    assert same(Cache(tmp_path / "cache", "cached_video").get(key, str(file)), entry(2))  # it may be gone


def test_a_file_that_broke_is_not_what_it_was(tmp_path):
    begin(tmp_path, DESCRIPTION)
    write(tmp_path, [1])
    assert complete(tmp_path, DESCRIPTION, [entry_key("entry", 1)]) == 0
    assert Cache(tmp_path, "cached_video").get(entry_key("entry", 1)) is None


def test_what_one_rank_could_not_read_and_another_could_is_there(tmp_path):
    """Of a file that is named twice. A file that has changed since its entry was made could not be read now."""
    files = {number: tmp_path / f"{number}.mp4" for number in range(4)}
    begin(tmp_path, DESCRIPTION)
    writer = ShardWriter(tmp_path)
    for number in (0, 1, 3):
        files[number].write_bytes(b"video")
        writer.add(entry_key("entry", number), entry(number), file_mark(str(files[number])))
    writer.flush()
    os.utime(files[1], ns=(1, 1))
    files[3].unlink()
    rejected = {entry_key("entry", number): str(file) for number, file in files.items()}
    assert without_entry(tmp_path, rejected) == [entry_key("entry", 1), entry_key("entry", 2)]
    assert without_entry(tmp_path, {}) == []


def test_a_name_that_no_file_can_have_is_of_none():
    assert file_mark("a\0b.mp4") == 0


def test_absurd_rates_are_thinned_alike_by_column_and_one_by_one():
    files = Files([300] * 6)
    files.fps = np.array([24.0, 1e6, 4e8, 5e10, 1e12, 1e300])
    for fps_max in (24, 0.5):
        windows, rows = ClipWindows(files, fps_max, 9), np.arange(6)
        intervals = [map_target_fps(fps, fps_max)[1] for fps in files.fps.tolist()]
        assert sampling_intervals(files.fps, fps_max).tolist() == intervals and min(intervals) > 0
        assert windows.count_all(rows, 129) == sum(windows.count(row, 129) for row in rows.tolist())
