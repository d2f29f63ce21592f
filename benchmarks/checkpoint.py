"""Checkpoints: how long training waits for one, and how long until it is on the disk.

python benchmarks/checkpoint.py
python benchmarks/checkpoint.py --folder /mnt/disk --hidden-size 2048 --repeats 5

One rank of a real engine (ZeRO-2, bf16 with fp32 masters and moments), saved as a run saves it. In turns, so that a
busy machine hits all alike:

    memcpy_s        all that is saved copied to memory that is there already, with Tensor.copy_
    async_stall_s   `save` with --async-io True, after the first (first_stall_s, which allocates the memory)
    write_s         from there until it is on the disk under its name
    sync_s          `save` with --async-io False
    torch_save_s    torch.save of the same tensors to one file, and fsync
    disk_floor_s    as many bytes written by 4 threads with O_DIRECT, without checksums, and fsync

Each is the median of the repeats; `range` has the smallest and the largest. verify_s: comparing the checkpoint with its
checksums. peak_extra_gb: growth of this process's memory through the background save. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from opensora.checkpoint_manifest import problems  # noqa: E402 - the repository need not be installed
from opensora.models.mmdit import MMDiT  # noqa: E402
from opensora.parallel.context import ParallelContext  # noqa: E402
from opensora.parallel.engine import Engine  # noqa: E402
from opensora.training.checkpoint import Checkpointer  # noqa: E402
from opensora.training.state import TrainState  # noqa: E402
from opensora.training.versions import versions  # noqa: E402

FLOOR_CHUNK = 2**24


def make_engine(context: ParallelContext, hidden_size: int) -> Engine:
    """An engine after one update, so that its optimizer has moments."""
    torch.manual_seed(0)
    head = hidden_size // 8
    model = MMDiT(
        in_channels=64,
        vec_in_dim=256,
        context_in_dim=256,
        hidden_size=hidden_size,
        mlp_ratio=4.0,
        num_heads=8,
        depth=3,
        depth_single_blocks=6,
        axes_dim=[head // 2, head // 4, head // 4],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
    ).to(torch.bfloat16)
    engine = Engine(
        context,
        model.to(context.device),
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "zero2",
        {},
        torch.bfloat16,
        grad_clip=1.0,
    )
    engine.forward_backward(lambda model: sum(p.float().square().mean() for p in model.parameters()))
    engine.step(1e-4)
    return engine


def saved_tensors(engine: Engine) -> dict[str, Tensor]:
    tensors = {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    for shard in engine.shards():
        tensors[f"master.{shard.name}"] = shard.master
        for kind, value in engine.optimizer_state(shard).items():
            if torch.is_tensor(value) and value.ndim:
                tensors[f"{kind}.{shard.name}"] = value
    return tensors


def copy_all(tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_save(tensors: dict[str, Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def write_floor(data: memoryview, path: Path) -> None:
    """Write whole pages by 4 threads past the cache."""
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT, 0o666)

    def write(start: int) -> None:
        os.pwrite(descriptor, data[start : start + FLOOR_CHUNK], start)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(0, len(data), FLOOR_CHUNK)))
    os.fsync(descriptor)
    os.close(descriptor)


def touched_pages(nbytes: int) -> mmap.mmap:
    """Memory of at least so many bytes, in whole chunks, that begins at a page."""
    pages = mmap.mmap(-1, -(-nbytes // FLOOR_CHUNK) * FLOOR_CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    return pages


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class Measurement:
    """The seconds of each figure, from every repeat."""

    def __init__(self, folder: Path, engine: Engine):
        self.folder, self.engine = folder, engine
        self.seconds: dict[str, list[float]] = {}
        self.tensors = saved_tensors(engine)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.checkpoint: Path | None = None
        self._step = 0

    def add(self, figure: str, value: float) -> None:
        self.seconds.setdefault(figure, []).append(value)
        print(f"{figure:16} {value:7.2f} s  {self.nbytes / value / 2**30:6.2f} GiB/s", flush=True)

    @contextmanager
    def copies(self) -> Iterator[dict[str, Tensor]]:
        yield {name: torch.full_like(t, 1, device="cpu") for name, t in self.tensors.items()}

    def save(self, checkpointer: Checkpointer) -> float:
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint)
        self._step += 1
        begin = time.perf_counter()
        self.checkpoint = checkpointer.save(self.folder, TrainState(global_step=self._step), {}, {})
        return time.perf_counter() - begin

    def save_in_background(self, checkpointer: Checkpointer) -> tuple[float, float]:
        """(seconds that training waits, seconds until it is on the disk after that)."""
        return self.save(checkpointer), seconds(checkpointer.wait)


def measure(measurement: Measurement, background: Checkpointer, foreground: Checkpointer, repeats: int) -> dict:
    before = resident_bytes()
    first_stall, _ = measurement.save_in_background(background)
    peak_extra = resident_bytes() - before
    for _ in range(repeats):
        with measurement.copies() as copies:
            measurement.add("memcpy_s", seconds(partial(copy_all, measurement.tensors, copies)))
        stall, write = measurement.save_in_background(background)
        measurement.add("async_stall_s", stall)
        measurement.add("write_s", write)
        measurement.add("verify_s", seconds(lambda: problems(measurement.checkpoint)))
        floor, pages = measurement.folder / "floor", touched_pages(measurement.nbytes)
        measurement.add("disk_floor_s", seconds(partial(write_floor, memoryview(pages), floor)))
        del pages
        floor.unlink()
        measurement.add("sync_s", measurement.save(foreground))
        saved = measurement.folder / "torch_save.pt"
        measurement.add("torch_save_s", seconds(partial(torch_save, measurement.tensors, saved)))
        saved.unlink()
    return {"first_stall_s": first_stall, "peak_extra_gb": peak_extra / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="a folder on the disk to measure (the current one)")
    parser.add_argument("--hidden-size", type=int, default=896, help="of the model; 896 makes 2.3 GB")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    context = ParallelContext.create()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-benchmark-") as folder:
        engine = make_engine(context, arguments.hidden_size)
        measurement = Measurement(Path(folder), engine)
        checkpointers = [Checkpointer(context, engine, None, in_background=choice) for choice in (True, False)]
        extra = measure(measurement, *checkpointers, arguments.repeats)
        for checkpointer in checkpointers:
            checkpointer.close()
    medians = {figure: statistics.median(values) for figure, values in measurement.seconds.items()}
    ranges = {figure: [round(min(v), 3), round(max(v), 3)] for figure, v in measurement.seconds.items()}
    print(
        json.dumps(
            {
                "gb": round(measurement.nbytes / 1e9, 3),
                **{figure: round(value, 3) for figure, value in (medians | extra).items()},
                "range": ranges,
                "repeats": arguments.repeats,
                "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {context.device.type}",
                "load_average": os.getloadavg()[0],
                **versions(),
            }
        )
    )
    context.close()


if __name__ == "__main__":
    main()
