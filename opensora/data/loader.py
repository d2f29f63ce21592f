"""Reads the samples that the sampler asks for, in worker processes, into batches that never change shape."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opensora.common import rank
from opensora.data.batch import Batch
from opensora.data.cache import Cache, NotCachedError, text_key
from opensora.data.cache_clips import ClipSize, ClipWindows
from opensora.data.captions import caption
from opensora.data.frame_rate import map_target_fps
from opensora.data.media import MediaError
from opensora.data.quarantine import Quarantine
from opensora.data.random_draws import Purpose, hash_key, to_uniform
from opensora.data.records import Table
from opensora.data.sampler import SampleRequest
from opensora.data.video import read_clip, window_indices
from opensora.registry import DATASETS

# Unreadable files named in an error.
_LISTED = 5


class _Sample(NamedTuple):
    row: int
    text: str
    tensors: dict[str, Tensor]  # "video": [3, T, H, W]; or of caches: "latents", those of the frames given, of the text


@DATASETS.register("video_text")
class VideoTextDataset(Dataset):
    """Videos and images with captions, from a table.

    Args:
        data_path: the table or the folder of its shards, see `records.Table`.
        transform_name: "resize_crop", the one there is: cover the bucket's size, then crop the centre.
        fps_max: faster videos are thinned to at most this rate, and the rate is told in the caption; None does neither.
        vmaf: tell the motion score in the caption, where the table has one.
        memory_efficient: read the table's shards, which scripts/cnv/shard.py makes, and not the table.
        resize: "fast" scales while decoding and gives uint8; "exact" gives the pixels of torch's bilinear
            interpolation, as float.
        read_timeout: seconds that reading one clip may take in a worker process; then the file counts as unreadable and
            a substitute takes its place. A batch loses at most twice that to such files, however many they are. Without
            workers (num_workers=0) a read that never returns holds up the run.
    """

    def __init__(
        self,
        data_path: str,
        transform_name: str = "resize_crop",
        fps_max: float | None = None,
        vmaf: bool = False,
        memory_efficient: bool = False,
        resize: str = "fast",
        read_timeout: float = 300.0,
    ):
        if transform_name != "resize_crop":
            raise ValueError(f"dataset.transform_name='{transform_name}' is unknown: use 'resize_crop'")
        if resize not in ("fast", "exact"):
            raise ValueError(f"dataset.resize='{resize}' is unknown: use 'fast' or 'exact'")
        if not read_timeout > 0:
            raise ValueError(f"dataset.read_timeout={read_timeout} must be more than 0 seconds")
        if not data_path:
            raise ValueError("dataset.data_path is not set: give a table with --dataset.data-path TABLE.csv")
        self.table = Table(data_path, memory_efficient)
        self.fps_max, self.vmaf, self.resize = fps_max, vmaf, resize
        self.read_clip, self.read_timeout = read_clip, read_timeout
        self.use_caches(None, None)

    def use_caches(self, video: Cache | None, text: Cache | None) -> None:
        """From now on take from these what they hold, instead of pixels, and beside captions."""
        self._cached_video, self._cached_text = video, text
        if video is not None:
            self.windows = ClipWindows(self.table, self.fps_max, video.description["made_with"]["windows"])

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, requests: Sequence[SampleRequest]) -> Batch | ValueError:
        """The micro-batch that one item of the sampler asks for.

        A sample that cannot be read is replaced by the first of its substitutes that can, or else by another sample of
        the batch. If no sample of the batch can be read, the error is returned: raised in a worker, it would reach the
        user as a traceback.
        """
        try:
            return self._read(requests)
        except NotCachedError as error:
            return error

    def _read(self, requests: Sequence[SampleRequest]) -> Batch | ValueError:
        if isinstance(self.read_clip, Quarantine):
            self.read_clip.begin_batch()
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
                return self._sample(row, request), failures
            except NotCachedError:
                raise
            except Exception as error:  # whatever is wrong with one file must not end a run of weeks
                failures.append({"path": self._name(row), "index": row, "reason": _reason(error)})
        return None, failures

    def _sample(self, row: int, request: SampleRequest) -> _Sample:
        text, tensors = self.caption(row), self._tensors(row, request)
        if self._cached_text is not None:
            tensors = tensors | self._cached_text.get(text_key(text))
        return _Sample(row, text, tensors)

    def _name(self, row: int) -> str:
        """The row's file, as far as the table can be read."""
        try:
            return self.table.path(row)
        except Exception as error:
            return f"row {row} of '{self.table.file}' ({_reason(error)})"

    def _tensors(self, row: int, request: SampleRequest) -> dict[str, Tensor]:
        """The window of a file that the request's seed chooses, or what a cache has of the one it chooses there."""
        u = float(to_uniform(hash_key(Purpose.WINDOW, request.seed)))
        size = (request.num_frames, request.height, request.width)
        if self._cached_video is None:
            return {"video": self.clip(row, size, u)}
        entry = self._cached_video.get(self.windows.draw(row, size, u), self.table.path(row))
        if entry is None:
            raise MediaError(self.table.path(row), "could not be read when cached_video was made")
        return entry

    def clip(self, row: int, size: ClipSize, u: float) -> Tensor:
        """A window of a file, `size` (frames, height, width), that begins at `u` in [0, 1): [3, T, H, W]."""
        num_frames, height, width = size
        _, interval = map_target_fps(float(self.table.fps[row]), self.fps_max)
        indices = window_indices(int(self.table.num_frames[row]), num_frames, interval, u)
        return self.read_clip(self.table.path(row), indices, height, width, self.resize)

    def _collate(self, requests: Sequence[SampleRequest], samples: list[_Sample], rejected: list[dict]) -> Batch:
        rows = [sample.row for sample in samples]
        place, stacked = requests[0], _stack([sample.tensors for sample in samples])
        return Batch(
            video=stacked.pop("video", None),  # [B, 3, T, H, W]
            text=[sample.text for sample in samples],
            index=rows,
            fps=[float(map_target_fps(float(self.table.fps[row]), self.fps_max)[0]) for row in rows],
            seed=[request.seed for request in requests],
            epoch=place.epoch,
            update=place.update,
            micro_step=place.micro_step,
            rejected=rejected,
            encoded=stacked,
            num_frames=place.num_frames,
        )

    def caption(self, row: int) -> str:
        """The row's text as the encoders get it."""
        score = None if self.table.score is None else float(self.table.score[row])
        return caption(self.table.text(row), float(self.table.fps[row]), score, self.fps_max, self.vmaf)


def _stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


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
    """A DataLoader of batches that raises the errors it is handed, and a WorkerDiedError of its own."""

    def __iter__(self) -> Iterator[Batch]:
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises a worker's death in the main thread, wherever that is; it belongs to who reads.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return self._checked(batches)

    def _checked(self, batches: Iterator[Batch | ValueError]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                raise WorkerDiedError(self._describe_death(batches)) from None
            if batch is None:
                return
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    def _describe_death(self, batches: Iterator) -> str:
        codes = [worker.exitcode for worker in getattr(batches, "_workers", ()) if worker.exitcode]
        ends = [signal.Signals(-code).name if code < 0 else f"exit status {code}" for code in codes]
        how = ", ".join(ends) or "of what is not known"
        return (
            f"rank {rank()}: a worker process of the data loader died ({how}), most likely since the host's memory or "
            f"/dev/shm ran out: lower --num-workers (now {self.num_workers}) or --prefetch-factor (now "
            f"{self.prefetch_factor}), or give the job more of it"
        )


class WorkerDiedError(ValueError):
    """A worker process of a data loader was ended from outside."""


def build_loader(
    dataset: VideoTextDataset,
    sampler: Iterable[list[SampleRequest]],
    num_workers: int = 0,
    prefetch_factor: int | None = None,
) -> BatchLoader:
    """An iterable of `Batch`, in the sampler's order whatever the number of workers; to be iterated once.

    Args:
        sampler: yields the requests of one micro-batch at a time.
        num_workers: processes that read ahead; 0 reads in this process.
        prefetch_factor: micro-batches that each worker reads ahead, 2 by default.

    Raises (while iterating):
        WorkerDiedError: a worker died.
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
            "multiprocessing_context": _WorkerContext(),
            "worker_init_fn": _start_worker,
        }
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the global generator is the trainer's; nothing is drawn from this one for data
        **workers,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _WorkerPopen(Popen):
    """`terminate` is what torch and Python's exit do to a worker that does not end; workers ignore SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _WorkerProcess(ForkProcess):
    _Popen = staticmethod(_WorkerPopen)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # What asks for a stop is for the process that trains alone: it stops its workers. torchrun sends it to the group of
    # that, a cluster to every process of a job.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    dataset = get_worker_info().dataset
    dataset.read_clip = Quarantine(dataset.read_clip, dataset.read_timeout)
