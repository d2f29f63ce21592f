"""Memory of training on a large table: that of a rank, and what each of its workers adds.

python benchmarks/table_memory.py                      10M rows
python benchmarks/table_memory.py --rows 1000000 --plain

A parquet file with a path and 300 characters of text per row is drawn in a temporary folder and cut by
scripts/cnv/shard.py's function in a process of its own. A fresh process then does what a rank does at its start: it
opens the table with memory_efficient, sorts it into the buckets of stage1 and plans the first epoch for 8 ranks. From
it a worker forks off as those of the loader do, and reads the path and text of rows at random; a part of them is
compared with what was drawn.

rank_mb     resident (VmRSS) after the first micro-batch was planned: imports, code and mapped files included;
rank_peak_mb   the most that was resident until then (VmHWM);
worker_mb   private, clean and dirty (smaps_rollup), of the worker after its reads;
ms          per row: one path and one text, looking for the file included.

The files are in the system's cache, as they were just written. --plain measures the table in memory too. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402

BATCH_ROWS, TEXT_LENGTH = 100_000, 300
CHECKED_EVERY = 100
BYTES_PER_ROW = 700  # of disk, for the table and its shards
WORDS = [
    "a heron",
    "lands",
    "on the lake",
    "while slow",
    "clouds pan",
    "behind it",
    "über die Bucht,",
    "from the",
    "猫",
]


class RowText:
    """The path and the text of each row, made from its number."""

    def __init__(self):
        words = np.random.default_rng(0).choice(WORDS, 4000)
        self.source = " ".join(words.tolist())
        self.starts = len(self.source) - TEXT_LENGTH

    def path(self, row: int) -> str:
        return f"datasets/videos/{row // 1000:06}/{row:09}.mp4"

    def text(self, row: int) -> str:
        start = row * 7919 % self.starts
        return self.source[start : start + TEXT_LENGTH]


def write_table(path: Path, rows: int) -> None:
    expected = RowText()

    def batch(first: int, count: int) -> pa.Table:
        draw = np.random.default_rng(first)
        height = draw.choice([360, 480, 720, 1080], count)
        width = draw.choice([480, 640, 1280, 1920], count)
        is_image = draw.random(count) < 0.2
        numbers = {
            "num_frames": np.where(is_image, 1, draw.integers(5, 300, count)),
            "height": height,
            "width": width,
            "aspect_ratio": height / width,
            "resolution": height * width,
            "fps": np.where(is_image, np.nan, draw.choice([24.0, 29.97, 30.0], count)),
        }
        numbers_of_rows = range(first, first + count)
        paths, texts = map(expected.path, numbers_of_rows), map(expected.text, numbers_of_rows)
        return pa.table({"path": list(paths), "text": list(texts), **numbers})

    with pa_parquet.ParquetWriter(path, batch(0, 1).schema) as writer:
        for first in range(0, rows, BATCH_ROWS):
            writer.write_table(batch(first, min(BATCH_ROWS, rows - first)))


def memory_mb(field: str, file: str = "status") -> float:
    """Of this process, in 10^6 bytes."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# --------------------------------------------------------------------------------------- in processes of their own


def shard(path: Path) -> dict[str, float]:
    from opensora.data.shards import write_shards

    start = time.perf_counter()
    write_shards(path)
    seconds = time.perf_counter() - start
    return {"shard_seconds": round(seconds, 1), "shard_peak_mb": round(memory_mb("VmHWM"), 1)}


def train(path: Path, memory_efficient: bool, reads: int) -> dict[str, float]:
    """A rank and its worker."""
    from opensora.data.bucket import BucketTable
    from opensora.data.loader import VideoTextDataset
    from opensora.data.sampler import BucketSampler

    imports = memory_mb("VmRSS")
    start = time.perf_counter()
    dataset = VideoTextDataset(str(path), fps_max=24, memory_efficient=memory_efficient)
    opened = time.perf_counter() - start
    bucket_config = runpy.run_path(str(ROOT / "configs/diffusion/train/stage1.py"))["bucket_config"]
    buckets = BucketTable({name: clips for name, clips in bucket_config.items() if name != "_delete_"}, fps_max=24)
    batches = iter(BucketSampler(dataset.table, buckets, data_parallel_size=8))
    next(batches)
    found = {
        "rank_mb": round(memory_mb("VmRSS"), 1),
        "rank_peak_mb": round(memory_mb("VmHWM"), 1),
        "imports_mb": round(imports, 1),
        "open_seconds": round(opened, 2),
    }
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=read_rows, args=(dataset, reads, sender))
    worker.start()
    found |= receiver.recv()
    worker.join()
    return found


def read_rows(dataset, reads: int, sender) -> None:
    expected, table = RowText(), dataset.table
    rows = np.random.default_rng(1).integers(0, len(table), reads).tolist()
    before, wrong, seconds = memory_mb("Private", "smaps_rollup"), 0, 0.0
    for i, row in enumerate(rows):
        start = time.perf_counter()
        path, text = table.path(row), table.text(row)
        seconds += time.perf_counter() - start
        if i % CHECKED_EVERY == 0:
            wrong += (path, text) != (expected.path(row), expected.text(row))
    assert not wrong, f"{wrong} rows are not what was drawn"
    private = memory_mb("Private", "smaps_rollup")
    sender.send(
        {
            "worker_mb": round(private, 1),
            "worker_growth_mb": round(private - before, 1),
            "ms": round(1000 * seconds / reads, 4),
        }
    )


# ------------------------------------------------------------------------------------------------------------ outside


def in_fresh_process(function: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", json.dumps([function, *map(str, arguments)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(function: str, path: str, *arguments: str) -> None:
    if function == "shard":
        found = shard(Path(path))
    else:
        memory_efficient, reads = arguments
        found = train(Path(path), memory_efficient == "True", int(reads))
    print(json.dumps(found))


def check_room(rows: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < rows * BYTES_PER_ROW:
        sys.exit(
            f"error: --rows {rows} needs {rows * BYTES_PER_ROW / 1e9:.1f} GB in {folder}: {free / 1e9:.1f} are free"
        )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--reads", type=int, default=200_000)
    parser.add_argument("--plain", action="store_true", help="measure memory_efficient=False too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    check_room(arguments.rows, arguments.folder)
    result: dict[str, object] = {"rows": arguments.rows}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "videos.parquet"
        write_table(path, arguments.rows)
        sharded = in_fresh_process("shard", path)
        result |= in_fresh_process("train", path, True, arguments.reads) | sharded
        if arguments.plain:
            plain = in_fresh_process("train", path, False, arguments.reads)
            result |= {f"plain_{key}": value for key, value in plain.items() if key != "imports_mb"}
    for key, value in result.items():
        print(f"{key:22} {value:,}")
    print(json.dumps(result | {"unit": "10^6 bytes, seconds, ms a row"} | describe_machine("pyarrow")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
