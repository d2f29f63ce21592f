"""Reads the samples that the sampler asks for, in worker processes, into batches that never change shape."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora.data.batch import Batch
from opensora.data.captions import caption
from opensora.data.frame_rate import map_target_fps
from opensora.data.media import MediaError
from opensora.data.random_draws import Purpose, hash_key, to_uniform
from opensora.data.records import Table
from opensora.data.sampler import SampleRequest
from opensora.data.video import read_clip, window_indices
from opensora.registry import DATASETS

# Unreadable files named in an error.
_LISTED = 5


class _Sample(NamedTuple):
    row: int
    clip: Tensor  # [3, T, H, W]


@DATASETS.register("video_text")
class VideoTextDataset(Dataset):
    """Videos and images with captions, from a table.

    Args:
        data_path: the table, see `records.Table`.
        transform_name: "resize_crop", the one there is: cover the bucket's size, then crop the centre.
        fps_max: faster videos are thinned to at most this rate, and the rate is told in the caption; None does neither.
        vmaf: tell the motion score in the caption, where the table has one.
        memory_efficient: must be False: reading a table in shards is not part of this version.
        resize: "fast" scales while decoding and gives uint8; "exact" gives the pixels of torch's bilinear
            interpolation, as float.
    """

    def __init__(
        self,
        data_path: str,
        transform_name: str = "resize_crop",
        fps_max: float | None = None,
        vmaf: bool = False,
        memory_efficient: bool = False,
        resize: str = "fast",
    ):
        if transform_name != "resize_crop":
            raise ValueError(f"dataset.transform_name='{transform_name}' is unknown: use 'resize_crop'")
        if resize not in ("fast", "exact"):
            raise ValueError(f"dataset.resize='{resize}' is unknown: use 'fast' or 'exact'")
        if memory_efficient:
            raise ValueError("dataset.memory_efficient=True is not available in this version: set it to False")
        if not data_path:
            raise ValueError("dataset.data_path is not set: give a table with --dataset.data-path TABLE.csv")
        self.table = Table(data_path)
        self.fps_max, self.vmaf, self.resize = fps_max, vmaf, resize

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, requests: Sequence[SampleRequest]) -> Batch | ValueError:
        """The micro-batch that one item of the sampler asks for.

        A sample that cannot be read is replaced by the first of its substitutes that can, or else by another sample of
        the batch. If no sample of the batch can be read, the error is returned: raised in a worker, it would reach the
        user as a traceback.
        """
        tried = [self._first_readable(request) for request in requests]
        readable = [sample for sample, _ in tried if sample is not None]
        if not readable:
            return ValueError(_unreadable([failure for _, failures in tried for failure in failures]))
        samples, rejected = [], []
        for i, (sample, failures) in enumerate(tried):
            samples.append(readable[i % len(readable)] if sample is None else sample)
            rejected += [failure | {"replaced_by": samples[-1].row} for failure in failures]
        return self._collate(requests, samples, rejected)

    def _first_readable(self, request: SampleRequest) -> tuple[_Sample | None, list[dict[str, Any]]]:
        """The sample or its first readable substitute, None if there is none; and what could not be read."""
        failures = []
        for row in (request.index, *request.substitutes):
            try:
                return _Sample(row, self._clip(row, request)), failures
            except Exception as error:  # whatever is wrong with one file must not end a run of weeks
                failures.append({"path": self.table.path(row), "index": row, "reason": _reason(error)})
        return None, failures

    def _clip(self, row: int, request: SampleRequest) -> Tensor:
        """The window of a file that the request's seed chooses: [3, T, H, W]."""
        _, interval = map_target_fps(float(self.table.fps[row]), self.fps_max)
        u = float(to_uniform(hash_key(Purpose.WINDOW, request.seed)))
        indices = window_indices(int(self.table.num_frames[row]), request.num_frames, interval, u)
        return read_clip(self.table.path(row), indices, request.height, request.width, self.resize)

    def _collate(self, requests: Sequence[SampleRequest], samples: list[_Sample], rejected: list[dict]) -> Batch:
        rows = [sample.row for sample in samples]
        place = requests[0]
        return Batch(
            video=torch.stack([sample.clip for sample in samples]),  # [B, 3, T, H, W]
            text=[self._caption(row) for row in rows],
            index=rows,
            fps=[float(map_target_fps(float(self.table.fps[row]), self.fps_max)[0]) for row in rows],
            seed=[request.seed for request in requests],
            epoch=place.epoch,
            update=place.update,
            micro_step=place.micro_step,
            rejected=rejected,
        )

    def _caption(self, row: int) -> str:
        score = None if self.table.score is None else float(self.table.score[row])
        return caption(self.table.text(row), float(self.table.fps[row]), score, self.fps_max, self.vmaf)


def _reason(error: Exception) -> str:
    if isinstance(error, MediaError):
        return error.reason
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unreadable(failures: list[dict[str, Any]]) -> str:
    files = {failure["path"]: failure["reason"] for failure in failures}
    named = "; ".join(f"{path} ({reason})" for path, reason in list(files.items())[:_LISTED])
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    return (
        f"no sample of a batch can be read, nor any substitute: {named}{more}. Is the data where the table says? "
        "Relative paths start from the working directory or the table's folder"
    )


class BatchLoader(DataLoader):
    """A DataLoader of batches that raises the errors it is handed."""

    def __iter__(self) -> Iterator[Batch]:
        return map(_checked, super().__iter__())


def _checked(batch: Batch | ValueError) -> Batch:
    if isinstance(batch, ValueError):
        raise batch
    return batch


def build_loader(
    dataset: VideoTextDataset,
    sampler: Iterable[list[SampleRequest]],
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """An iterable of `Batch`, in the sampler's order whatever the number of workers; to be iterated once.

    Args:
        sampler: yields the requests of one micro-batch at a time.
        num_workers: processes that read ahead; 0 reads in this process.
        prefetch_factor: micro-batches that each worker reads ahead, 2 by default.
        pin_memory: hand out the video in page-locked memory.

    Raises (while iterating):
        RuntimeError: a worker died.
        ValueError: no sample of a batch can be read.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must not be negative")
    if prefetch_factor is not None and prefetch_factor < 1:
        raise ValueError(f"prefetch_factor={prefetch_factor} must be at least 1")
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {
            "prefetch_factor": prefetch_factor or 2,
            "persistent_workers": True,
            # Fork shares the table with the workers instead of copying it; workers never touch a GPU.
            "multiprocessing_context": "fork",
            "worker_init_fn": _start_worker,
        }
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the global generator is the trainer's; nothing is drawn from this one for data
        **workers,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains: it stops its workers
