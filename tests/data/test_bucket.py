"""Buckets against golden numbers of Open-Sora 2.0 and against a naive implementation that takes row by row."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.aspect import closest_ratio, resolution_sizes
from opensora.data.bucket import CHUNK_ROWS, BucketTable

GOLDEN = Path(__file__).parents[1] / "golden"
BUCKETS = json.loads((GOLDEN / "buckets.json").read_text())
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())


def bucket_config(name: str) -> dict:
    if name != "docs_example":
        return CONFIGS[f"configs/diffusion/train/{name}.py"]["bucket_config"]
    clips = {1: (1.0, 45), 33: (1.0, 12), 65: (1.0, 6), 97: (1.0, 4), 129: (1.0, 3)}
    return {"256px": clips, "768px": {1: (0.5, 13)}, "1024px": {1: (0.5, 7)}}


def names_of(buckets: BucketTable, ids: np.ndarray) -> list:
    return [None if i < 0 else list(buckets.buckets[i][:3]) for i in ids]


@pytest.mark.parametrize("name", BUCKETS)
def test_assignment_equals_golden(name):
    golden = BUCKETS[name]
    buckets = BucketTable(bucket_config(name), golden["fps_max"])
    assert len(buckets) == golden["num_bucket"]
    columns = [np.array(column) for column in zip(*(row[:3] for row in golden["rows"]), strict=True)]
    fps = np.array([math.nan if row[3] is None else row[3] for row in golden["rows"]])
    for position, seed in enumerate(golden["seeds"], start=4):
        seeds = np.full(len(fps), seed, dtype=np.uint64)  # every golden row was drawn from `default_rng(seed)` itself
        assert names_of(buckets, buckets.assign_seeded(*columns, fps, seeds).ids) == [
            r[position] for r in golden["rows"]
        ]


@pytest.mark.parametrize("name", BUCKETS)
def test_clip_sizes_and_batch_sizes_equal_golden(name):
    buckets = {bucket[:3]: bucket for bucket in BucketTable(bucket_config(name), 24).buckets}
    for key, clip, batch_size, _ in BUCKETS[name]["thw"]:
        bucket = buckets[tuple(key)]
        assert [bucket.num_frames, bucket.height, bucket.width] == clip and bucket.batch_size == batch_size


def test_number_of_buckets():
    counts = {"stage1": 393, "stage2": 847, "stage2_i2v": 858, "image": 41, "demo": 44}
    assert {name: len(BucketTable(bucket_config(name), 24)) for name in counts} == counts


def naive_bucket(config, row, num_frames, height, width, fps, fps_max, seed):
    """Spec 7, read literally."""
    if num_frames < 1 or height < 1 or width < 1:
        return None
    interval = math.ceil(fps / fps_max) if fps_max and not math.isnan(fps) and fps >= fps_max else 1
    tables = {name: resolution_sizes(name, 16) for name in config}
    num_bucket = sum(len(tables[name]) for name in config for _ in config[name])
    random = np.random.default_rng(seed + row * num_bucket)
    length = num_frames // interval
    for name in sorted(config, key=lambda name: int(name[:-2]), reverse=True):
        if height * width < 0.8 * int(name[:-2]) ** 2:
            continue
        if length == 1:
            if 1 in config[name] and random.random() < config[name][1][0]:
                return [name, 1, closest_ratio(height, width, list(tables[name]))]
            continue
        for clip in sorted(config[name], reverse=True):
            if clip == 1 or clip > length:
                continue
            probability = config[name][clip][0]
            if isinstance(probability, tuple):
                probability, skip = probability
                if skip >= 1 or random.random() <= skip:
                    continue
            if probability >= 1 or random.random() <= probability:
                return [name, clip, closest_ratio(height, width, list(tables[name]))]
            break
    return None


def random_table(random, count):
    height = random.choice([64, 144, 205, 256, 360, 480, 720, 1080], count) + random.integers(-8, 9, count)
    width = (height * random.uniform(0.3, 3, count)).astype(int)
    num_frames = np.where(random.random(count) < 0.3, random.integers(0, 3, count), random.integers(1, 200, count))
    fps = np.where(random.random(count) < 0.3, np.nan, random.choice([8, 23.976, 24, 25, 29.97, 30, 60, 120], count))
    return num_frames, height, width, fps


def random_probability(random, image):
    p, q = random.choice([0.0, 0.25, 0.5, 0.9, 1.0], 2).tolist()
    return (p, q) if not image and random.random() < 0.5 else p


@pytest.mark.parametrize("case", range(12))
def test_assignment_equals_the_naive_one_on_random_tables(case):
    random = np.random.default_rng(case)
    config = {}
    for name in random.permutation(["64px", "256px", "400px", "768px"])[: 1 + case % 4].tolist():
        clips = random.permutation([1, 5, 9, 17, 33, 65, 129])[: 1 + case % 7].tolist()
        config[name] = {clip: (random_probability(random, clip == 1), 2) for clip in clips}
    fps_max = [None, 16, 24, 30][case % 4]
    columns = random_table(random, 400)
    seed, epoch = 1000 * case, case % 3
    buckets = BucketTable(config, fps_max)
    assignment = buckets.assign(*columns, seed=seed, epoch=epoch)
    rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
    expected = [naive_bucket(config, i, *row, fps_max, seed + epoch) for i, row in rows]
    assert names_of(buckets, assignment.ids) == expected
    assert sum(assignment.dropped.values()) == expected.count(None)


probabilities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
clips = st.dictionaries(
    st.sampled_from([5, 9, 17, 33, 65, 129]),
    st.tuples(st.one_of(probabilities, st.tuples(probabilities, probabilities)), st.just(2)),
)
images = st.dictionaries(st.just(1), st.tuples(probabilities, st.just(2)))
configs = st.dictionaries(
    st.sampled_from(["64px", "256px", "400px", "768px"]),
    st.tuples(clips, images).map(lambda entries: entries[0] | entries[1]).filter(bool),
    min_size=1,
)
sides = st.one_of(st.integers(0, 64), st.integers(200, 300), st.integers(1, 2000))
rates = st.one_of(st.just(math.nan), st.sampled_from([24.0, 24.000001, 48.0, 29.97]), st.floats(0.001, 1e9))
rows = st.lists(st.tuples(st.integers(0, 300), sides, sides, rates), min_size=1, max_size=40)


@given(configs, rows, st.sampled_from([None, 16, 24, 29.97]), st.integers(0, 2**40), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_assignment_equals_the_naive_one_for_any_configuration(config, rows, fps_max, seed, epoch):
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    buckets = BucketTable(config, fps_max)
    assignment = buckets.assign(*columns, seed=seed, epoch=epoch)
    expected = [naive_bucket(config, i, *row, fps_max, seed + epoch) for i, row in enumerate(rows)]
    assert names_of(buckets, assignment.ids) == expected
    assert sum(assignment.dropped.values()) == expected.count(None)


def test_chunks_do_not_show():
    columns = [np.full(CHUNK_ROWS + 50, value) for value in (1, 800, 800)]
    fps = np.full(CHUNK_ROWS + 50, np.nan)
    config = bucket_config("image")
    ids = BucketTable(config, 24).assign(*columns, fps, seed=7).ids
    for row in (0, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 49):
        config_of_tuples = {name: {int(t): (p, n) for t, (p, n) in clips.items()} for name, clips in config.items()}
        expected = naive_bucket(config_of_tuples, row, 1, 800, 800, math.nan, 24, 7)
        assert names_of(BucketTable(config, 24), ids[[row]]) == [expected]


def test_reasons_of_dropped_rows():
    config = {"256px": {33: (0.0, 4), 17: (1.0, 4)}, "128px": {1: (1.0, 8), 17: (1.0, 4)}, "64px": {9: (1.0, 4)}}
    rows = [
        (0, 300, 300, 24, "without a positive num_frames"),
        (33, 40, 40, 24, "smaller than every resolution"),
        (1, 300, 300, 30, "images that have an fps above"),
        (1, 60, 60, np.nan, "images without an image bucket"),
        (5, 60, 60, 24, "videos shorter"),
        (2, 300, 300, 120, "videos shorter"),
        (33, 300, 300, 24, None),
        (1, 130, 130, np.nan, None),
    ]
    buckets = BucketTable(config, 24)
    for *sizes, fps, reason in rows:
        assignment = buckets.assign(*(np.array([size]) for size in sizes), np.array([fps]))
        if reason is None:
            assert assignment.ids[0] >= 0 and not assignment.dropped
        else:
            assert assignment.ids[0] == -1
            ((given, count),) = assignment.dropped.items()
            assert reason in given and count == 1
    nothing = BucketTable({"64px": {9: (0.0, 4)}}).assign(*(np.array([64]),) * 3, np.array([24.0]))
    assert list(nothing.dropped) == ["left out by the probabilities of bucket_config"]


def test_keys_and_pairs_as_json_has_them():
    tuples = BucketTable({"256px": {1: (0.5, 2), 33: ((0.5, 0.25), 4)}}, 24)
    lists = BucketTable({"256px": {"1": [0.5, 2], "33": [[0.5, 0.25], 4]}}, 24)
    assert tuples.buckets == lists.buckets and tuples.fingerprint == lists.fingerprint
    assert BucketTable({"256px": {33: (0.0, None)}}).buckets  # a filter, as older configs have it


def test_fingerprint_ignores_batch_sizes_only():
    base = BucketTable({"256px": {33: (1.0, 4)}}, 24, 16).fingerprint
    assert BucketTable({"256px": {33: (1.0, 8)}}, 24, 16).fingerprint == base
    others = [
        BucketTable({"256px": {33: (0.5, 4)}}, 24, 16),
        BucketTable({"256px": {29: (1.0, 4)}}, 24, 16),
        BucketTable({"272px": {33: (1.0, 4)}}, 24, 16),
        BucketTable({"256px": {33: (1.0, 4)}}, 30, 16),
        BucketTable({"256px": {33: (1.0, 4)}}, 24, 8),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "bucket_config is empty"),
        ({"256": {1: (1.0, 2)}}, "resolution '256' is unknown"),
        ({"256px": {}}, "must be {num_frames"),
        ({"256px": {"x": (1.0, 2)}}, "positive integer"),
        ({"256px": {0: (1.0, 2)}}, "positive integer"),
        ({"256px": {1: 2}}, "must be \\(probability, batch size\\)"),
        ({"256px": {1: (1.5, 2)}}, "within 0 and 1"),
        ({"256px": {33: ((0.5, 1.5), 2)}}, "within 0 and 1"),
        ({"256px": {1: ((0.5, 0.5), 2)}}, "images have one probability"),
        ({"256px": {1: (1.0, 0)}}, "batch size must be a positive"),
        ({"256px": {1: (1.0, None)}}, "batch size must be a positive"),
        ({"256px": {1: (1.0, 2), "1": (1.0, 3)}}, "twice"),
    ],
)
def test_entries_that_cannot_be_used(config, message):
    with pytest.raises(ValueError, match=message) as error:
        BucketTable(config, 24)
    assert "\n" not in str(error.value)


def test_rate_limit_must_be_positive():
    with pytest.raises(ValueError, match="fps_max=0"):
        BucketTable(bucket_config("demo"), 0)
