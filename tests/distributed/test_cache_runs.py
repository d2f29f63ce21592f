"""Training from a cache: the losses of training without one, no encoders, and a word about what is stale."""

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from runs import metrics, numbers, train
from safetensors.torch import save_file
from shapes_world import SMALL_MODEL

from opensora.config import load_config
from opensora.data.cache import Cache, shard_keys, text_key
from opensora.data.cache_index import Key
from opensora.models.autoencoder import HunyuanVAE
from opensora.training.cache_settings import CacheSettings, validate_cache
from opensora.training.settings import check_paths, validate

# No file is longer than the clip it is in (rows are cut so), so there is one window of each.
BUCKETS = ["--bucket-config", "{'64px': {1: (1.0, 6), 5: (1.0, 3), 9: (1.0, 4)}}"]
HUNYUAN = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32}
CONDITIONS = ["--condition-config", "{'t2v': 2, 'i2v_head': 2, 'i2v_tail': 1, 'i2v_loop': 2}"]
DROPOUT = ["--dropout-ratio", "{'t5': 0.4, 'clip': 0.4}"]


def make_cache(context, root: Path, arguments: list[str]) -> str | None:
    """What cache.py does, in a process group that is already there; returns what it complains of."""
    from opensora.training.encode_cache import CacheRun

    os.chdir(root)
    cfg = load_config(arguments, CacheSettings)
    validate(cfg, context.world_size)
    validate_cache(cfg)
    check_paths(cfg)
    try:
        CacheRun(cfg, context).run()
    except ValueError as error:
        return str(error)


def complaint(context, root: Path, arguments: list[str]) -> str:
    try:
        train(context, root, arguments)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def table(shapes) -> Path:
    """36 rows, each of a length that is one clip's: 1, 5 or 9 frames."""
    header, *rows = (shapes.root / shapes.table).read_text().splitlines()
    place = header.split(",").index("num_frames")
    cut = []
    for row in rows:
        columns = row.split(",")
        frames = int(columns[place])
        columns[place] = str(next(length for length in (9, 5, 1) if length <= frames))
        cut.append(",".join(columns))
    videos = [row for row in cut if row.split(",")[place] != "1"]
    images = [row for row in cut if row.split(",")[place] == "1"]
    path = shapes.root / "datasets/cached.csv"
    path.write_text("\n".join([header, *videos[:36], *images[:12]]) + "\n")
    return path


@pytest.fixture
def arguments(shapes, table):
    def make(*more: str) -> list[str]:
        few = ("--dataset.data-path", str(table), "--num-workers", "0", "--max-steps", "3", "--ckpt-every", "0")
        return shapes.train_arguments(*few, *BUCKETS, *DROPOUT, *CONDITIONS, *more)

    return make


@pytest.fixture(scope="module")
def hunyuan(shapes) -> list[str]:
    weights = "ckpts/cache_vae.safetensors"
    torch.manual_seed(0)
    save_file(HunyuanVAE(**HUNYUAN).vae.state_dict(), shapes.root / weights)
    return ["--ae", str({"type": "hunyuan_vae", "from_pretrained": weights, **HUNYUAN})]


@pytest.fixture(scope="module")
def linear_cache(two_ranks, shapes, table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    settings = ["--dataset.data-path", str(table), "--num-workers", "1", *BUCKETS, *CONDITIONS]
    assert two_ranks(make_cache, shapes.root, shapes.train_arguments(*settings, "--output", str(folder))) == [None] * 2
    return folder


def use(folder: Path) -> list[str]:
    return ["--cached-video", str(folder), "--cached-text", str(folder)]


def test_the_losses_are_those_without_a_cache(one_rank, two_ranks, shapes, arguments, linear_cache, tmp_path):
    """With text dropout and given frames, in fp32; a cache that two ranks made serves one."""
    common = ["--outputs", str(tmp_path), "--exp-name"]
    one_rank(train, shapes.root, arguments(*common, "plain"))
    one_rank(train, shapes.root, arguments(*common, "cached", *use(linear_cache)))
    one_rank(train, shapes.root, arguments(*common, "text", "--cached-text", str(linear_cache), "--num-workers", "2"))
    for name in ("cached", "text"):
        for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / name), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"])


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_of_a_posterior_samples_are_drawn_while_training(one_rank, shapes, arguments, hunyuan, tmp_path, dtype):
    common = [*hunyuan, "--dtype", dtype]
    assert one_rank(make_cache, shapes.root, arguments(*common, "--output", str(tmp_path / "cache"))) == [None]
    runs = [*common, "--outputs", str(tmp_path), "--exp-name"]
    one_rank(train, shapes.root, arguments(*runs, "plain"))
    one_rank(train, shapes.root, arguments(*runs, "cached", *use(tmp_path / "cache")))
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "cached"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    cache = Cache(tmp_path / "cache/video", "cached_video")
    assert cache.description["posterior"] == [pytest.approx(0.476986), 0.0]


def test_a_resumed_run_is_exact_with_a_cache(two_ranks, shapes, arguments, linear_cache, tmp_path):
    common = [*use(linear_cache), "--outputs", str(tmp_path), "--num-workers", "1", "--ckpt-every", "1"]
    two_ranks(train, shapes.root, arguments(*common, "--exp-name", "whole"))
    two_ranks(train, shapes.root, arguments(*common, "--exp-name", "parts", "--max-steps", "1"))
    resume = ["--exp-name", "parts", "--load", str(tmp_path / "parts")]
    two_ranks(train, shapes.root, arguments(*common, *resume))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_neither_encoders_nor_videos_are_touched(one_rank, shapes, arguments, linear_cache, tmp_path, monkeypatch):
    """Run without the videos: they may be gone."""
    videos = shapes.root / "datasets/shapes"
    videos.rename(videos.with_name("away"))
    try:
        run = [*use(linear_cache), "--outputs", str(tmp_path), "--exp-name", "run"]
        assert one_rank(count_encoders, shapes.root, arguments(*run)) == [0]
    finally:
        videos.with_name("away").rename(videos)
    assert len(metrics(tmp_path / "run")) == 3 and not (tmp_path / "run/rejected.jsonl").exists()


def count_encoders(context, root, arguments) -> int:
    """Builds of encoders in a run."""
    import opensora.training.build as build

    built, original = [], build.build_frozen
    build.build_frozen = lambda *arguments: built.append(arguments) or original(*arguments)
    try:
        train(context, root, arguments)
    finally:
        build.build_frozen = original
    return len(built)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--dtype", "bf16"], "dtype"),
        (["--dataset.fps-max", "24"], "dataset.fps_max"),
        (["--dataset.resize", "exact"], "dataset.resize"),
        (["--bucket-config", "{'64px': {5: (1.0, 3)}}"], "bucket_config"),
        (["--condition-config", "{'t2v': 1, 'v2v_head': 1}"], None),  # longer than any clip: nothing is needed for it
        (["--t5.max-length", "10"], "t5.max_length"),
        (["--bucket-config", "{'64px': {1: (1.0, 2), 5: (1.0, 2), 9: (1.0, 2)}}"], None),  # batch sizes may change
    ],
)
def test_a_stale_cache_is_refused_by_name(one_rank, shapes, arguments, linear_cache, tmp_path, change, named):
    run = [*use(linear_cache), "--outputs", str(tmp_path), "--max-steps", "0", "--exp-name", "run"]
    (message,) = one_rank(complaint, shapes.root, arguments(*run, *change))
    if named is None:
        assert message == ""
    else:
        assert "is stale" in message and named in message and "\n" not in message


def test_changed_weights_and_tables_are_noticed(one_rank, shapes, table, arguments, linear_cache, tmp_path):
    run = [*use(linear_cache), "--outputs", str(tmp_path), "--max-steps", "1"]
    other = tmp_path / "t5"
    shutil.copytree(shapes.root / "ckpts/shapes/t5", other)
    run_moved = [*run, "--exp-name", "moved", "--t5.from-pretrained", str(other)]
    assert one_rank(complaint, shapes.root, arguments(*run_moved)) == [""]  # where weights lie does not matter
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    (message,) = one_rank(complaint, shapes.root, arguments(*run_moved))
    assert "t5.from_pretrained" in message and "is stale" in message

    lines = table.read_text().splitlines()
    changed = tmp_path / "changed.csv"
    changed.write_text("\n".join([lines[0], *(line.replace(",a ", ",the ") for line in lines[1:])]) + "\n")
    assert changed.read_text() != table.read_text() + "\n"
    (message,) = one_rank(complaint, shapes.root, arguments(*run, "--dataset.data-path", str(changed)))
    assert "cached_text" in message and "text" in message
    shorter = tmp_path / "shorter.csv"
    shorter.write_text("\n".join(lines[:-3]) + "\n")
    (message,) = one_rank(complaint, shapes.root, arguments(*run, "--dataset.data-path", str(shorter)))
    assert "dataset.data_path" in message


def test_equal_names_elsewhere_are_other_files(one_rank, shapes, table, arguments, linear_cache, tmp_path):
    shutil.copytree(shapes.root / "datasets", tmp_path / "datasets")
    (tmp_path / "ckpts").symlink_to(shapes.root / "ckpts")
    run = [*use(linear_cache), "--outputs", str(tmp_path), "--max-steps", "1", "--exp-name", "elsewhere"]
    run += ["--dataset.data-path", str(tmp_path / "datasets" / table.name)]
    (message,) = one_rank(complaint, tmp_path, arguments(*run))
    assert "is stale: it has the folder of relative paths" in message


def test_an_interrupted_cache_goes_on_and_an_old_one_grows(two_ranks, one_rank, shapes, table, arguments, tmp_path):
    lines = table.read_text().splitlines()
    half = tmp_path / "half.csv"
    half.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    output = ["--output", str(tmp_path / "cache")]
    assert two_ranks(make_cache, shapes.root, arguments(*output, "--dataset.data-path", str(half))) == [None] * 2
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    description = tmp_path / "cache/video/cache.json"
    written = json.loads(description.read_text())
    description.write_text(json.dumps({**written, "index": None}))  # as it is while shards are written
    run = [*use(tmp_path / "cache"), "--outputs", str(tmp_path), "--exp-name", "run"]
    (message,) = one_rank(complaint, shapes.root, arguments(*run))
    assert "is not complete" in message
    assert one_rank(make_cache, shapes.root, arguments(*output)) == [None]
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items())  # none is made again
    cache = Cache(tmp_path / "cache/video", "cached_video")
    assert len(cache.index) == len(lines) - 1
    assert text_key("") in Cache(tmp_path / "cache/text", "cached_text")
    assert one_rank(complaint, shapes.root, arguments(*run)) == [""]
    (message,) = one_rank(make_cache, shapes.root, arguments(*output, "--dtype", "bf16"))
    assert "dtype" in message and "another --output" in message


def test_what_cannot_be_read_is_replaced(one_rank, shapes, table, arguments, tmp_path):
    lines = table.read_text().splitlines()
    (tmp_path / "broken.mp4").write_text("no video")
    lines[1] = ",".join([str(tmp_path / "broken.mp4"), *lines[1].split(",")[1:]])
    broken = tmp_path / "table.csv"
    broken.write_text("\n".join(lines) + "\n")
    data = ["--dataset.data-path", str(broken)]
    output = ["--output", str(tmp_path / "cache"), "--encode-text", "False"]
    assert one_rank(make_cache, shapes.root, arguments(*data, *output)) == [None]
    assert "broken.mp4" in (tmp_path / "cache/video/rejected.jsonl").read_text()
    run = ["--cached-video", str(tmp_path / "cache"), "--outputs", str(tmp_path), "--exp-name", "run"]
    one_rank(train, shapes.root, arguments(*data, *run, "--max-steps", "12"))
    rejected = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name for entry in rejected} == {"broken.mp4"}
    assert all("when cached_video was made" in entry["reason"] for entry in rejected)


def test_drawn_buckets_are_of_the_seed_that_is_drawn_with(one_rank, shapes, arguments, tmp_path):
    """That of the checkpoint, where one brings its own."""
    drawn = ["--bucket-config", "{'64px': {5: (0.5, 3), 9: (0.5, 4), 1: (1.0, 6)}}", "--seed"]
    cache = ["--output", str(tmp_path / "cache")]
    assert one_rank(make_cache, shapes.root, arguments(*cache, *drawn, "7")) == [None]
    common = ["--outputs", str(tmp_path), "--max-steps", "1", "--ckpt-every", "1"]
    (message,) = one_rank(complaint, shapes.root, arguments(*common, *use(tmp_path / "cache"), *drawn, "8"))
    assert "is stale" in message and "seed 7" in message and "with --seed 8" in message
    one_rank(train, shapes.root, arguments(*common, *drawn, "8", "--exp-name", "eight"))
    one_rank(train, shapes.root, arguments(*common, *drawn, "7", "--exp-name", "seven"))
    common += ["--max-steps", "2", *use(tmp_path / "cache")]
    load = lambda name: ["--load", str(tmp_path / name), "--exp-name", name]  # noqa: E731
    (message,) = one_rank(complaint, shapes.root, arguments(*common, *drawn, "7", *load("eight")))
    assert "this run draws with 8" in message
    assert one_rank(complaint, shapes.root, arguments(*common, *drawn, "8", *load("seven"))) == [""]


def make_cache_with_a_slow_rank(context, root: Path, arguments: list[str], patience_s: float) -> list[int]:
    """Make a cache in a group whose collectives give up after `patience_s`, which rank 1 exceeds with its first batch.

    Returns how many captions and clips this rank encoded.
    """
    import opensora.training.encode_cache as encode_cache

    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
    counts = {"build_text_encoders": 0, "build_video_encoder": 0}

    def slow(name):
        original = getattr(encode_cache, name)

        def build(*arguments):
            encoders = original(*arguments)
            entries = encoders.entries

            def slow_entries(inputs, *others):
                if not counts[name]:
                    time.sleep(1.4 * patience_s if context.rank == 1 else 1.0)
                counts[name] += len(inputs)
                return entries(inputs, *others)

            encoders.entries = slow_entries
            return encoders

        return original, build

    originals = {}
    for name in counts:
        originals[name], replaced = slow(name)
        setattr(encode_cache, name, replaced)
    try:
        assert make_cache(replace(context, host_group=group), root, arguments) is None
    finally:
        for name, original in originals.items():
            setattr(encode_cache, name, original)
    return list(counts.values())


@pytest.mark.slow
def test_ranks_take_work_as_they_are_done_and_wait_for_the_slow(two_ranks, shapes, arguments, linear_cache, tmp_path):
    """Longer than collectives wait; and what is encoded is the same, whoever does it."""
    output = ["--output", str(tmp_path / "cache")]
    fast, slow = two_ranks(make_cache_with_a_slow_rank, shapes.root, arguments(*output), 15.0)
    assert fast[1] > slow[1] > 0
    assert fast[1] + slow[1] == len(Cache(tmp_path / "cache/video", "cached_video").index)
    for kind in ("video", "text"):
        ours, theirs = (Cache(folder / kind, kind) for folder in (tmp_path / "cache", linear_cache))
        assert ours.index.highs.tolist() == theirs.index.highs.tolist()
        for key in map(Key, ours.index.highs.tolist(), ours.index.lows.tolist()):
            first, second = ours.get(key), theirs.get(key)
            assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_file_that_was_replaced_is_encoded_anew(one_rank, shapes, table, arguments, tmp_path):
    """By another of equal length and size: the table still says the truth of it."""
    rows = [line.split(",") for line in table.read_text().splitlines()]
    path = rows[0].index("path")
    videos = [row for row in rows[1:] if row[rows[0].index("num_frames")] == "9"]
    replaced = tmp_path / "replaced.mp4"
    shutil.copy(shapes.root / videos[0][path], replaced)
    videos[0][path] = str(replaced)
    changed = tmp_path / "table.csv"
    changed.write_text("\n".join(",".join(row) for row in [rows[0], *videos]) + "\n")
    run = arguments("--dataset.data-path", str(changed), "--bucket-config", "{'64px': {9: (1.0, 4)}}")
    cache = ["--output", str(tmp_path / "cache"), "--encode-text", "False"]
    assert one_rank(make_cache, shapes.root, [*run, *cache]) == [None]
    shards = set((tmp_path / "cache/video/shards").iterdir())
    os.utime(replaced, ns=(1, 1))
    use_cache = ["--cached-video", str(tmp_path / "cache"), "--outputs", str(tmp_path), "--max-steps", "20"]
    (message,) = one_rank(complaint, shapes.root, [*run, *use_cache, "--exp-name", "stale"])
    assert "replaced.mp4' has changed since it was encoded" in message
    assert one_rank(make_cache, shapes.root, [*run, *cache]) == [None]
    (new,) = set((tmp_path / "cache/video/shards").iterdir()) - shards
    assert len(shard_keys(tmp_path / "cache/video", new.name)) == 1  # it alone
    assert one_rank(complaint, shapes.root, [*run, *use_cache, "--exp-name", "fresh"]) == [""]


@pytest.mark.slow
def test_the_commands(shapes, table, tmp_path):
    settings = ["--dataset.data-path", str(table), *BUCKETS, *SMALL_MODEL]
    output = ["--output", str(tmp_path / "cache"), "--windows", "2"]
    shapes.run("scripts/cnv/cache.py", *shapes.train_arguments(*settings, *output), ranks=2)
    run = [*use(tmp_path / "cache"), "--outputs", str(tmp_path), "--exp-name", "run", "--max-steps", "2"]
    shapes.run("scripts/diffusion/train.py", *shapes.train_arguments(*settings, *run), ranks=2)
    assert len(metrics(tmp_path / "run")) == 2
