"""Out of memory: which bucket it was, and smaller batches of it from the next start on.

A rank that runs out of memory leaves a part of the gradients reduced and the others waiting for the rest: the update
cannot be taken back on all ranks. So the process ends, and with oom_policy="shrink" it leaves a note in the run folder:
the bucket's batches have half the samples when the run is started again, by torchrun --max-restarts with auto_resume.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from opensora.common import get_logger
from opensora.data.loader import WorkerDiedError
from opensora.training.whereabouts import EVALUATION, Whereabouts

SHRUNK_FILE = "shrunk_buckets.jsonl"
# Where memory is needed in proportion to a batch.
_SHRINKABLE = ("encode", "forward_backward")
# Closing what is open can wait for ranks that wait for this one.
_CLOSING_S = 10.0
# What torch's plain RuntimeErrors say where memory ran out: of the host, and of the device outside torch's allocator.
_HOST_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
_DEVICE_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of the device or of the host."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_MEMORY + _DEVICE_MEMORY)
    )


@contextmanager
def naming_failures(
    place: Whereabouts, run_folder: Path, shrinks: bool, finish_save: Callable[[], None]
) -> Iterator[None]:
    """Name the batch in which the run failed. Where memory ran out this one line is all, and the process ends;
    so it is where a worker of the data loader died, mostly of the same.

    Args:
        shrinks: whether a smaller batch size is to be noted for the next start.
        finish_save: waits for the checkpoint that is being written, if there is one, before the process ends; an
            OSError says that it failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            get_logger().error(f"failed in {place}")
            raise
        _end_with(_report(error, place, run_folder, shrinks), finish_save)
    except WorkerDiedError as error:
        _end_with(str(error), finish_save)


def _end_with(message: str, finish_save: Callable[[], None]) -> NoReturn:
    """Say why at once, before the others see that this rank is gone, and end."""
    get_logger().error(f"error: {message}")
    try:
        finish_save()
    except OSError as error:
        get_logger().error(str(error))
    last_resort = threading.Timer(_CLOSING_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    raise SystemExit(1) from None


def _report(error: BaseException, place: Whereabouts, run_folder: Path, shrinks: bool) -> str:
    what = f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}): {place}"
    if place.phase == EVALUATION:
        return (
            f"{what}. Draw smaller samples (eval_option), or evaluate the loss of fewer clip sizes (eval_data_path, "
            "or --eval-samples 0); --eval-every 0 trains without evaluations"
        )
    if not place.micro_batches or place.phase not in _SHRINKABLE:
        return f"{what}. Free memory, or use more ranks or a smaller model"
    bucket = place.bucket()
    what = f"{what}; its batch size is {bucket.batch_size}"
    if bucket.batch_size == 1:
        return f"{what}, which cannot be less: recompute more (grad_checkpoint), use smaller clips or more ranks"
    smaller = bucket.batch_size // 2
    if not shrinks:
        return (
            f"{what}: set bucket_config.{bucket.resolution}.{bucket.num_frames} to {smaller}; or --oom-policy shrink "
            "--auto-resume True halves it when the run is started again"
        )
    note = {"resolution": bucket.resolution, "num_frames": bucket.num_frames, "batch_size": smaller}
    with open(run_folder / SHRUNK_FILE, "a") as file:  # a short line is appended whole, whoever else writes
        file.write(json.dumps(note | {"rank": place.rank, "update": place.update}) + "\n")
    return f"{what}, and {smaller} from the next start on ({run_folder / SHRUNK_FILE})"


def read_shrunk(run_folder: Path) -> dict[tuple[str, int], int]:
    """The batch sizes that earlier starts of a run noted: {(resolution, frames): samples}."""
    path, shrunk = run_folder / SHRUNK_FILE, {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            note = json.loads(line)
        except json.JSONDecodeError:  # half a line, of a full disk
            continue
        key = (note["resolution"], note["num_frames"])
        shrunk[key] = min(note["batch_size"], shrunk.get(key, note["batch_size"]))
    return shrunk


def shrink_buckets(bucket_config: dict, shrunk: dict[tuple[str, int], int]) -> None:
    """Lower the batch sizes of `bucket_config`, in place, to those of `read_shrunk`."""
    for (resolution, num_frames), smaller in shrunk.items():
        odds, batch_size = bucket_config.get(resolution, {}).get(num_frames, (0, 0))
        if batch_size > smaller:
            bucket_config[resolution][num_frames] = (odds, smaller)
            get_logger().warning(
                f"bucket {resolution}/{num_frames}: batch size {smaller} instead of {batch_size}, which ran out of "
                f"memory ({SHRUNK_FILE}, to be removed to try again)"
            )
