"""Batches from real files: whatever is wrong with some of them, and whoever reads them, batches are as planned."""

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opensora.data.batch import Batch
from opensora.data.bucket import BucketTable
from opensora.data.loader import VideoTextDataset, WorkerDiedError, build_loader
from opensora.data.sampler import BucketSampler, SampleRequest
from opensora.data.shards import write_shards
from opensora.data.video import read_clip
from opensora.registry import DATASETS

CONFIG = {"64px": {1: (1.0, 3), 5: (1.0, 2), 9: (1.0, 2)}, "48px": {5: (1.0, 3)}}


def write_video(path: Path, num_frames: int, height: int, width: int, fps: int = 24) -> None:
    """Frame i is grey: 10 + 10 * i."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(num_frames):
            pixels = np.full((height, width, 3), 10 + 10 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each kind; rows of a table may share them."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "long.mp4", 20, 64, 64)
    write_video(folder / "fast.mp4", 20, 64, 64, fps=48)
    write_video(folder / "short.mp4", 1, 64, 64)
    write_video(folder / "small.mp4", 6, 48, 48)
    (folder / "truncated.mp4").write_bytes((folder / "long.mp4").read_bytes()[:-400])
    (folder / "text.mp4").write_text("no video")
    Image.new("RGB", (64, 64), (200, 100, 50)).save(folder / "image.png")
    return folder


def make_table(folder: Path, name: str, rows: list[tuple]) -> Path:
    """rows: (file, num_frames, side, fps)."""
    columns = zip(*rows, strict=True)
    data = pd.DataFrame(dict(zip(("path", "num_frames", "height", "fps"), columns, strict=True)))
    data["width"], data["aspect_ratio"], data["resolution"] = data.height, 1.0, data.height**2
    data["text"] = [f"Clip {i}." for i in range(len(data))]
    data.to_csv(folder / name, index=False)
    return folder / name


MIXED = [("long.mp4", 20, 64, 24), ("fast.mp4", 20, 64, 48), ("small.mp4", 6, 48, 24), ("image.png", 1, 64, None)] * 4


@pytest.fixture
def mixed(folder):
    return VideoTextDataset(str(make_table(folder, "mixed.csv", MIXED)), fps_max=24)


def sampler_of(dataset, config=CONFIG, **options) -> BucketSampler:
    return BucketSampler(dataset.table, BucketTable(config, dataset.fps_max), **options)


def batches_of(dataset, num_workers=0, config=CONFIG, **options) -> list[Batch]:
    return list(build_loader(dataset, sampler_of(dataset, config, **options), num_workers))


def facts(batch: Batch) -> tuple:
    return tuple(value for name, value in vars(batch).items() if name != "video")


def test_batches_of_images_and_videos_at_two_resolutions(mixed):
    batches = batches_of(mixed)
    shapes = {tuple(batch.video.shape) for batch in batches}
    assert shapes == {(3, 3, 1, 64, 64), (2, 3, 9, 64, 64), (3, 3, 5, 48, 48)}
    for batch in batches:
        assert batch.video.dtype == torch.uint8 and len(batch) == len(batch.video)
        assert len(batch.text) == len(batch.index) == len(batch.fps) == len(batch.seed)
        assert not batch.rejected
        for text, index, fps in zip(batch.text, batch.index, batch.fps, strict=True):
            is_image = MIXED[index][1] == 1
            assert text == (f"Clip {index}." if is_image else f"Clip {index}. 24 FPS.")
            assert fps == (0 if is_image else 24)


def test_clips_are_the_windows_that_they_should_be(mixed):
    starts = set()
    for batch in batches_of(mixed, epochs=3):
        for clip, index in zip(batch.video, batch.index, strict=True):
            file, num_frames, _, fps = MIXED[index]
            if file == "image.png":
                assert (clip[:, 0, 32, 32] - torch.tensor([200, 100, 50])).abs().max() <= 1
                continue
            numbers = ((clip.float().mean(dim=(0, 2, 3)) - 10) / 10).round().int().tolist()  # of the frames
            # Evenly over a window; faster videos take every second frame (of a window one frame shorter, spec 7).
            assert numbers == sorted(set(numbers)) and numbers[0] >= 0 and numbers[-1] < num_frames
            span = numbers[-1] - numbers[0]
            assert span == (len(numbers) - 1 if fps == 24 else 2 * len(numbers) - 1)
            starts.add((file, numbers[0]))
    assert len([start for file, start in starts if file == "long.mp4"]) > 3  # they differ


@pytest.mark.parametrize("resize", ["fast", "exact"])
def test_the_resize_mode_is_handed_on(folder, resize):
    table = make_table(folder, "one.csv", [("long.mp4", 20, 64, 24)])
    dataset = VideoTextDataset(str(table), resize=resize)
    (batch,) = batches_of(dataset, config={"48px": {9: (1.0, 1)}})
    assert batch.video.dtype == (torch.uint8 if resize == "fast" else torch.float32)
    clips = [read_clip(folder / "long.mp4", range(first, first + 9), 48, 48, resize) for first in range(12)]
    assert sum(torch.equal(batch.video[0], clip) for clip in clips) == 1


def test_two_workers_hand_out_what_none_does(mixed):
    alone, together = (batches_of(mixed, num_workers, epochs=2, accumulation_steps=2) for num_workers in (0, 2))
    assert len(alone) == len(together) > 4
    for a, b in zip(alone, together, strict=True):
        assert facts(a) == facts(b)
        assert torch.equal(a.video, b.video)


def test_a_batch_knows_its_place_and_a_resume_goes_on_there(mixed):
    sampler = sampler_of(mixed, epochs=2, accumulation_steps=2)
    batches = list(build_loader(mixed, sampler))
    places = [(b.epoch, b.update, b.micro_step) for b in batches]
    assert places == [(e, u, m) for e in (0, 1) for u in range(sampler.len_epoch(e)) for m in (0, 1)]
    stopped = batches[3]  # the second micro-step of update 1: two updates are done
    resumed = sampler_of(mixed, epochs=2, accumulation_steps=2)
    resumed.load_state_dict(sampler.state_dict(stopped.epoch, stopped.update + 1))
    for a, b in zip(build_loader(mixed, resumed), batches[4:], strict=True):
        assert facts(a) == facts(b) and torch.equal(a.video, b.video)


def test_the_window_belongs_to_seed_epoch_and_sample(mixed):
    clips = {}
    for size in (1, 2):
        for rank in range(size):
            for batch in batches_of(mixed, epochs=2, data_parallel_size=size, data_parallel_rank=rank):
                for clip, index in zip(batch.video, batch.index, strict=True):
                    assert torch.equal(clip, clips.setdefault((batch.epoch, index), clip))


BAD = {
    "absent.mp4": "not found",
    "truncated.mp4": "",
    "text.mp4": "not a video",
    "short.mp4": "too few frames",
}


def test_bad_files_are_replaced_from_their_bucket_and_shapes_stay(folder):
    files = ["long.mp4"] * 6 + list(BAD)
    dataset = VideoTextDataset(str(make_table(folder, "bad.csv", [(file, 20, 64, 24) for file in files])))
    batches, again = (batches_of(dataset, workers, epochs=2, config={"64px": {9: (1.0, 5)}}) for workers in (0, 2))
    assert [facts(batch) for batch in batches] == [facts(batch) for batch in again]
    assert len(batches) == 4
    rejected = [entry for batch in batches for entry in batch.rejected]
    assert {Path(entry["path"]).name for entry in rejected} == set(BAD)
    for batch in batches:
        assert batch.video.shape == (5, 3, 9, 64, 64)
        assert all(files[index] == "long.mp4" for index in batch.index)
        assert all(text.startswith(f"Clip {index}.") for text, index in zip(batch.text, batch.index, strict=True))
        assert len(set(batch.seed)) == 5
        for entry in batch.rejected:
            assert files[entry["index"]] == Path(entry["path"]).name
            assert BAD[files[entry["index"]]] in entry["reason"]
            assert entry["replaced_by"] in batch.index


def test_without_readable_substitutes_a_sample_of_the_batch_is_repeated(folder):
    files = ["long.mp4", "short.mp4", "text.mp4"]
    dataset = VideoTextDataset(str(make_table(folder, "few.csv", [(file, 20, 64, 24) for file in files])))
    requests = next(iter(sampler_of(dataset, {"64px": {9: (1.0, 3)}})))
    batch = dataset.__getitems__([request._replace(substitutes=()) for request in requests])
    assert batch.index == [0, 0, 0] and batch.video.shape == (3, 3, 9, 64, 64)
    assert sorted((entry["index"], entry["replaced_by"]) for entry in batch.rejected) == [(1, 0), (2, 0)]
    assert torch.equal(batch.video[0], batch.video[1]) and len(set(batch.seed)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_any_readable_sample_is_an_error_of_one_line(folder, num_workers):
    dataset = VideoTextDataset(str(make_table(folder, "none.csv", [(file, 20, 64, 24) for file in BAD])))
    with pytest.raises(ValueError) as error:
        batches_of(dataset, num_workers, config={"64px": {9: (1.0, 2)}})
    message = str(error.value)
    assert "\n" not in message and "no sample of a batch can be read" in message
    assert sum(name in message for name in BAD) == 4 and "not found" in message


class Dying(VideoTextDataset):
    def __getitems__(self, requests):
        if requests[0].update == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(requests)


def test_a_worker_that_dies_is_an_error(folder):
    dataset = Dying(str(make_table(folder, "dying.csv", [("long.mp4", 20, 64, 24)] * 20)))
    with pytest.raises(WorkerDiedError, match=r"a worker process of the data loader died \(SIGKILL\)"):
        batches_of(dataset, 1, config={"64px": {9: (1.0, 2)}})


def test_the_global_generator_is_left_alone(mixed):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches_of(mixed, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_motion_scores(folder):
    file = make_table(folder, "scores.csv", [("image.png", 1, 64, None)] * 3)
    data = pd.read_csv(file).assign(score_vmafmotion=[3.5, math.nan, 1.2])
    data.to_csv(file, index=False)
    for vmaf, expected in ((True, {"Clip 0. 4 motion score.", "Clip 1.", "Clip 2. 1 motion score."}), (False, None)):
        dataset = DATASETS.build({"type": "video_text", "data_path": str(file), "fps_max": 24, "vmaf": vmaf})
        (batch,) = batches_of(dataset)
        assert set(batch.text) == (expected or {"Clip 0.", "Clip 1.", "Clip 2."})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"transform_name": "center"}, "transform_name='center' is unknown: use 'resize_crop'"),
        ({"resize": "slow"}, "resize='slow' is unknown"),
        ({"memory_efficient": True}, "memory_efficient=True reads shards, and"),
        ({"data_path": None}, "data_path is not set"),
        ({"data_path": "absent.csv"}, "absent.csv' does not exist"),
    ],
)
def test_settings_that_cannot_be_used(folder, setting, message):
    table = make_table(folder, "settings.csv", MIXED)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DATASETS.build({"type": "video_text", "data_path": str(table)} | setting)


def test_worker_settings_that_cannot_be_used(mixed):
    with pytest.raises(ValueError, match="num_workers=-1"):
        build_loader(mixed, sampler_of(mixed), -1)
    with pytest.raises(ValueError, match="prefetch_factor=0"):
        build_loader(mixed, sampler_of(mixed), 1, 0)


def test_a_worker_that_is_killed_is_named_where_batches_are_read(mixed):
    """And nowhere else: torch raises it in the main thread, whatever that is doing."""
    others = multiprocessing.active_children()  # an earlier test's, that are not collected yet
    batches = iter(build_loader(mixed, sampler_of(mixed), num_workers=2, prefetch_factor=1))
    next(batches)
    victim = next(child for child in multiprocessing.active_children() if child.daemon and child not in others)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    time.sleep(0.1)  # for torch to raise it here
    with pytest.raises(WorkerDiedError) as raised:
        list(batches)
    assert str(raised.value) == (
        "rank 0: a worker process of the data loader died (SIGKILL), most likely since the host's memory or "
        "/dev/shm ran out: lower --num-workers (now 2) or --prefetch-factor (now 1), or give the job more of it"
    )


def test_a_worker_survives_a_stop_of_the_whole_job_but_not_its_end(mixed):
    """A cluster sends SIGTERM to every process; what the process that trains ends is ended, whatever it is doing."""
    others = multiprocessing.active_children()
    batches = iter(build_loader(mixed, sampler_of(mixed), num_workers=1, prefetch_factor=1))
    next(batches)
    worker = next(child for child in multiprocessing.active_children() if child.daemon and child not in others)
    os.kill(worker.pid, signal.SIGTERM)
    assert all(next(batches) for _ in range(3)) and worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_rows_that_the_table_does_not_give_are_replaced(folder, tmp_path):
    """Of shards that were cut off, or hold no text, since the run began."""
    table = make_table(folder, "cut.csv", [("long.mp4", 20, 64, 24)] * 4)
    write_shards(table)
    dataset = VideoTextDataset(str(table), memory_efficient=True)
    place = {"epoch": 0, "update": 0, "micro_step": 0}
    requests = [SampleRequest(row, 9, 64, 64, substitutes=(1,), seed=row, **place) for row in (0, 2, 3)]
    strings = folder / "cut" / "rows" / "strings.utf8"
    content = strings.read_bytes()
    place = content.index(b"Clip 2") + 3
    strings.write_bytes(content[:place] + b"\xff" + content[place + 1 : -4])
    batch = dataset.__getitems__(requests)
    assert batch.index == [0, 1, 1] and [text[:7] for text in batch.text] == ["Clip 0.", "Clip 1.", "Clip 1."]
    assert ["utf-8" in line["reason"] for line in batch.rejected] == [True, False]
    assert f"OSError: '{strings}' ends at byte" in batch.rejected[1]["reason"]
    os.truncate(folder / "cut" / "rows" / "ends.int64", 0)
    error = dataset.__getitems__(requests)
    assert isinstance(error, ValueError) and "row 0 of '" in str(error) and "\n" not in str(error)
