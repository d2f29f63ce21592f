"""Videos per second of scripts/cnv/meta.py, beside a full decode of each file.

python benchmarks/meta.py
python benchmarks/meta.py --rows 100000 --num-workers 8

A table names a few h264 files of 640x360 and 100 frames again and again: mp4, of which the header is read, and, apart,
mkv, whose packets are counted. A file's own part in memory is warm: it is processor time that is compared. The decode
is PyAV's with one thread, without conversion to RGB. The last line is a JSON object; ratio is decoding / ours in CPU
seconds per file, in one process; videos_per_s is the whole command's work, tables included, with all workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.data.metadata import add_metadata  # noqa: E402 - the repository need not be installed
from opensora.data.probe import probe  # noqa: E402

FRAMES, HEIGHT, WIDTH, FILES = 100, 360, 640, 4


def write_videos(folder: Path, suffix: str) -> list[Path]:
    """Files of a moving texture with grain."""
    draw = np.random.default_rng(0)
    texture = np.kron(draw.integers(0, 255, (HEIGHT // 8, WIDTH // 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    paths = [folder / f"{i}{suffix}" for i in range(FILES)]
    for path in paths:
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=24, options={"preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for number in range(FRAMES):
                picture = np.roll(texture, -2 * number, axis=1)[:, :WIDTH] // 2
                picture += draw.integers(0, 12, (HEIGHT, WIDTH, 1), dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            file.mux(stream.encode())
    return paths


def decode_all(path: Path) -> int:
    with av.open(str(path)) as file:
        file.streams.video[0].thread_count = 1
        return sum(1 for _ in file.decode(video=0))


def cpu_seconds(action: Callable[[Path], object], paths: list[Path], repeats: int) -> list[float]:
    """Per file, in each of the repeats."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        for path in paths:
            action(path)
        seconds.append((time.process_time() - begin) / len(paths))
    return seconds


def compare(paths: list[Path], repeats: int) -> tuple[float, float]:
    """(decoding / ours, ms of ours): medians."""
    if [decode_all(path) for path in paths] != [probe(path).num_frames for path in paths]:
        raise SystemExit("the header's number of frames differs from the decoder's")
    decoding = statistics.median(cpu_seconds(decode_all, paths, repeats))
    ours = statistics.median(cpu_seconds(probe, paths * 25, repeats))
    return round(decoding / ours, 1), round(1000 * ours, 3)


def videos_per_second(folder: Path, paths: list[Path], rows: int, num_workers: int) -> float:
    table = folder / "table.csv"
    lines = [f"{paths[i % len(paths)]},a caption of some words number {i}" for i in range(rows)]
    table.write_text("\n".join(["path,text", *lines]) + "\n")
    begin = time.perf_counter()
    written = add_metadata(table, folder / "out.csv", num_workers).written
    return round(written / (time.perf_counter() - begin), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_videos(folder, ".mp4")
        ratio, ms = compare(files, arguments.repeats)
        ratio_mkv, ms_mkv = compare(write_videos(folder, ".mkv"), arguments.repeats)
        rate = videos_per_second(folder, files, arguments.rows, arguments.num_workers)
        alone = videos_per_second(folder, files, arguments.rows, 0)
    figures = {
        "videos_per_s": rate,
        "videos_per_s_one_process": alone,
        "ratio": ratio,
        "ms_per_video": ms,
        "ratio_mkv": ratio_mkv,
        "ms_per_video_mkv": ms_mkv,
        "rows": arguments.rows,
        "num_workers": arguments.num_workers,
        "repeats": arguments.repeats,
    }
    print(json.dumps(figures | describe_machine("av")))


if __name__ == "__main__":
    main()
