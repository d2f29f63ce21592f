"""Sorting a table's rows into buckets: seconds for all rows at once, beside a loop over the rows.

python benchmarks/buckets.py                                  1M rows, stage1
python benchmarks/buckets.py --rows 10000000 --config stage2

The loop takes a row at a time in plain Python and does what the specification says, with everything that does not
depend on the row prepared before, and a random generator made only for rows that draw from it. It is run on
`--loop-rows` of the rows, in the same process, and its seconds are scaled to all of them; the buckets that it finds
must be the same. The peak is numpy's memory in the call by tracemalloc, the answer included and the table not, in a
run of its own. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import statistics
import sys
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.data.bucket import BucketTable  # noqa: E402 - the repository need not be installed

FPS_MAX = 24
Columns = tuple[NDArray, NDArray, NDArray, NDArray]


def read_bucket_config(config: str) -> dict[str, dict]:
    settings = runpy.run_path(str(ROOT / f"configs/diffusion/train/{config}.py"))["bucket_config"]
    return {name: clips for name, clips in settings.items() if name != "_delete_"}


def draw_table(rows: int) -> Columns:
    """num_frames, height, width, fps: a third are images, of which the fps is unknown."""
    draw = np.random.default_rng(0)
    height = draw.choice([240, 360, 480, 720, 1080, 2160], rows) + draw.integers(-8, 9, rows)
    width = (height * draw.uniform(0.4, 2.4, rows)).astype(np.int32)
    is_image = draw.random(rows) < 1 / 3
    num_frames = np.where(is_image, 1, draw.integers(2, 400, rows))
    fps = np.where(is_image, np.nan, draw.choice([23.976, 24, 25, 29.97, 30, 50, 60], rows))
    return num_frames.astype(np.int32), height.astype(np.int32), width, fps


class RowLoop:
    """The bucket of one row after another."""

    def __init__(self, bucket_config: Mapping[str, Mapping], buckets: BucketTable):
        self.place = {bucket[:3]: i for i, bucket in enumerate(buckets.buckets)}
        self.clips = {
            name: sorted(((int(clip), entry[0]) for clip, entry in clips.items()), reverse=True)
            for name, clips in bucket_config.items()
        }
        self.names = sorted(self.clips, key=lambda name: int(name[:-2]), reverse=True)
        self.areas = {name: 0.8 * int(name[:-2]) ** 2 for name in self.names}
        self.ratios: dict[str, dict[str, float]] = {name: {} for name in self.names}
        for bucket in buckets.buckets:
            width, height = map(float, bucket.ratio.split(":"))
            self.ratios[bucket.resolution].setdefault(bucket.ratio, height / width)

    def bucket(self, row: int, num_frames: int, height: int, width: int, fps: float) -> int:
        interval = math.ceil(fps / FPS_MAX) if fps >= FPS_MAX else 1  # NaN is not
        length, generator = num_frames // interval, None

        def hits(probability: float) -> bool:
            nonlocal generator
            generator = generator or np.random.default_rng(row * len(self.place))
            return generator.random() <= probability

        for name in self.names:
            if height * width < self.areas[name]:
                continue
            for clip, probability in self.clips[name]:
                if clip > length or (clip == 1) != (length == 1):
                    continue
                if isinstance(probability, tuple):
                    probability, skip = probability
                    if skip >= 1 or hits(skip):
                        continue
                if probability >= 1 or hits(probability):
                    ratios = self.ratios[name]
                    ratio = min(ratios, key=lambda ratio: abs(height / width - ratios[ratio]))
                    return self.place[name, clip, ratio]
                break
        return -1


def time_loop(loop: RowLoop, columns: Columns, rows: int) -> tuple[float, list[int]]:
    """Seconds for the first rows, and their buckets."""
    lists = [column[:rows].tolist() for column in columns]
    start = time.perf_counter()
    found = [loop.bucket(i, *row) for i, row in enumerate(zip(*lists, strict=True))]
    return time.perf_counter() - start, found


def time_ours(buckets: BucketTable, columns: Columns) -> float:
    start = time.perf_counter()
    buckets.assign(*columns)
    return time.perf_counter() - start


def peak_mib(buckets: BucketTable, columns: Columns) -> float:
    tracemalloc.start()
    buckets.assign(*columns)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--loop-rows", type=int, default=100_000, help="rows that the loop is measured on")
    parser.add_argument("--config", default="stage1", help="of configs/diffusion/train")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    bucket_config = read_bucket_config(arguments.config)
    buckets, columns = BucketTable(bucket_config, FPS_MAX), draw_table(arguments.rows)
    loop, loop_rows = RowLoop(bucket_config, buckets), min(arguments.loop_rows, arguments.rows)
    ids = buckets.assign(*columns).ids  # warms up
    time_loop(loop, columns, loop_rows // 10)
    seconds, loop_seconds = [], []
    for _ in range(arguments.repeats):
        seconds.append(time_ours(buckets, columns))
        taken, found = time_loop(loop, columns, loop_rows)
        loop_seconds.append(taken * arguments.rows / loop_rows)
        if ids[:loop_rows].tolist() != found:
            sys.exit("error: the loop finds other buckets")
    print(f"{arguments.rows:,} rows, {len(buckets)} buckets, {np.mean(ids >= 0):.0%} of the rows in one")
    print(f"ours {statistics.median(seconds):.3f} s, the loop {statistics.median(loop_seconds):.2f} s (scaled)")
    result = {
        "rows": arguments.rows,
        "seconds": round(statistics.median(seconds), 3),
        "seconds_range": [round(min(seconds), 3), round(max(seconds), 3)],
        "ratio": round(statistics.median(loop_seconds) / statistics.median(seconds), 1),
        "loop_seconds": round(statistics.median(loop_seconds), 2),
        "loop_rows": loop_rows,
        "peak_mib": round(peak_mib(buckets, columns), 1),
        "config": arguments.config,
        "repeats": arguments.repeats,
    }
    print(json.dumps(result | describe_machine("numpy")))


if __name__ == "__main__":
    main(sys.argv[1:])
