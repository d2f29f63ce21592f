"""scripts/cnv/buckets.py as it is documented, on real files: its numbers, its clips, its errors."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.data.bucket import BucketTable
from opensora.data.loader import VideoTextDataset
from opensora.data.report import human
from opensora.data.sampler import BucketSampler

CONFIG = str(Path(__file__).parents[1] / "configs/diffusion/train/shapes.py")
BUCKETS = {"64px": {1: (1.0, 6), 5: (1.0, 3), 9: (1.0, 4)}}
TABLE = ["--dataset.data-path", "datasets/shapes_nec.csv", "--dataset.fps-max", "12"]
ARGUMENTS = [CONFIG, *TABLE, "--bucket-config", str(BUCKETS)]


def run(shapes, *more, check=True):
    return shapes.run("scripts/cnv/buckets.py", *ARGUMENTS, *more, check=check)


@pytest.fixture(scope="module")
def written(shapes):
    """(what it said, the folder it wrote) with two ranks and a preview."""
    result = run(shapes, "--world-size", "2", "--preview", "8", "--seed", "7")
    return result.stdout, shapes.root / "outputs/buckets-shapes_nec"


def requests_of_training(shapes, ranks: int, seed: int):
    """The requests of the first epoch in the order of updates and ranks, from the samplers of the ranks."""
    dataset = VideoTextDataset(str(shapes.root / shapes.table), fps_max=12)
    samplers = [
        BucketSampler(
            dataset.table, BucketTable(BUCKETS, 12), seed=seed, data_parallel_size=ranks, data_parallel_rank=r
        )
        for r in range(ranks)
    ]
    return dataset, [request for step in zip(*samplers, strict=True) for batch in step for request in batch]


def test_table_counts_what_training_sees(shapes, written):
    said, folder = written
    _, requests = requests_of_training(shapes, 2, 7)
    with (folder / "buckets.csv").open() as file:
        counts = list(csv.DictReader(file))
    assert sum(int(count["seen"]) for count in counts) == len(requests)
    assert sum(int(count["frames"]) for count in counts) == sum(request.num_frames for request in requests)
    tokens = sum(((r.num_frames - 1) // 4 + 1) * (r.height // 16) * (r.width // 16) for r in requests)
    assert sum(int(count["tokens"]) for count in counts) == tokens
    for count in counts:
        left_out = sum(int(count[name]) for name in ("starved", "incomplete", "surplus"))
        assert int(count["samples"]) == int(count["seen"]) + left_out
    assert sum(float(count["cost_share"]) for count in counts) == pytest.approx(1, abs=1e-4)
    updates = max(request.update for request in requests) + 1
    assert sum(float(count["steps"]) for count in counts) == pytest.approx(updates, abs=1e-2)
    assert f"an epoch: {updates} updates of 2 data-parallel ranks x 1" in said
    assert re.search(r"^64px/9 +4 ", said, re.MULTILINE) and re.search(r"^balance: [01]\.\d{4}", said, re.M)
    for part in ("images : videos:", "left over in this epoch", "rows without a batch: "):
        assert part in said


def test_picture_is_drawn(written):
    with Image.open(written[1] / "buckets.png") as image:
        assert image.size[0] > 1000 and len(image.convert("L").getcolors()) > 10


def test_preview_is_what_training_decodes(shapes, written, monkeypatch):
    monkeypatch.chdir(shapes.root)  # the table's paths are relative
    dataset, requests = requests_of_training(shapes, 2, 7)
    folder = written[1] / "preview"
    with (folder / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert [int(sample["row"]) for sample in samples] == [request.index for request in requests[:8]]
    for sample, request in zip(samples, requests, strict=False):
        batch = dataset.__getitems__([request])
        assert sample["text"] == batch.text[0] == (folder / sample["file"]).with_suffix(".txt").read_text().strip()
        assert (int(sample["num_frames"]), int(sample["height"]), int(sample["width"])) == request[1:4]
        expected = batch.video[0].permute(1, 2, 3, 0).numpy()
        found = read(folder / sample["file"])
        assert found.shape == expected.shape
        tolerance = 0 if sample["file"].endswith(".png") else 6  # mp4 loses a little
        assert np.abs(found.astype(float) - expected).mean() <= tolerance
    assert Image.open(folder / "samples.png").size[0] > 1000


def read(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    import av

    if path.suffix == ".png":
        return np.array(Image.open(path))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preview", "-1"], "preview=-1 must be at least 0"),
        (["--dataset.data-path", "nix.csv"], "dataset.data_path='nix.csv' does not exist"),
        (["--bucket-config", "{'64px': {1: (1.0, 6000)}}"], "no batch can be formed"),
    ],
)
def test_mistakes_get_one_line(shapes, arguments, message):
    result = run(shapes, *arguments, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and message in result.stderr


def test_human():
    numbers = [0, 999, 1000, 12345, 99960, 999_499, 999_600, 1.93e9, 5e17]
    assert [human(n) for n in numbers] == ["0", "999", "1.00k", "12.3k", "100k", "999k", "1.00M", "1.93G", "500P"]
