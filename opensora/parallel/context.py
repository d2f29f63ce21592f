"""Processes, devices and groups: what a rank needs to know of the job it is part of."""

from __future__ import annotations

import atexit
import datetime
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from opensora.common import die_with_parent, world_size
from opensora.parallel.interface import choose_interface


@dataclass(frozen=True)
class RankGroup:
    """Some ranks of the job, and this rank's place among them.

    Attributes:
        rank, size: of the group. process_group: for its collectives; None for a group of one.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def any(self, facts: Sequence[bool]) -> list[bool]:
        """Which facts are true on some rank of the group; all of its ranks call it, with as many facts."""
        found = torch.tensor(facts, dtype=torch.uint8)
        if self.process_group is not None and facts:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.process_group)
        return found.bool().tolist()

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the group's first rank, on all of them."""
        if self.process_group is None:
            return values
        values = values.contiguous()
        dist.broadcast(values, group=self.process_group, group_src=0)
        return values


ALONE = RankGroup()


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the job: rank = (data * sequence.size + sequence) * tensor.size + tensor.

    Attributes:
        rank, world_size: of all processes.
        device: what this rank computes on.
        host_group: a gloo group of all ranks for objects and checkpoints; apart from the default group, so that
            its collectives can run beside training's.
        tensor: ranks that hold the parts of one copy of the model.
        sequence: ranks that hold the parts of one sequence of tokens.
        model: both: ranks that see the same samples.
        data: ranks of like place in theirs; each sees other samples.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup
    timeout: datetime.timedelta
    tensor: RankGroup
    sequence: RankGroup
    model: RankGroup
    data: RankGroup

    @classmethod
    def create(cls, timeout_s: float = 1800.0) -> ParallelContext:
        """Join the job that torchrun or `colossalai run` started; without a launcher, a job of one process.

        As a context manager it leaves the job in the end; after an error without waiting for ranks that wait for this
        one, when all has been said.

        Raises:
            ValueError: more processes were started on this node than it has GPUs.
        """
        die_with_launcher()
        choose_interface()
        device = _local_device()
        timeout = datetime.timedelta(seconds=timeout_s)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend, options = "cpu:gloo,cuda:nccl", {"device_id": device}
        else:
            backend, options = "gloo", {}
        if "RANK" not in os.environ:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store over its restarts, and ranks would find the addresses of those before them.
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            options |= {"store": dist.PrefixStore(f"start{start}", store), "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=timeout, **options)
        host_group = dist.new_group(backend="gloo", timeout=timeout)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        everyone = RankGroup(rank, world_size, dist.group.WORLD if world_size > 1 else None)
        return cls(rank, world_size, device, host_group, timeout, ALONE, ALONE, ALONE, everyone)

    def share_samples(self, tensor_size: int, sequence_size: int) -> ParallelContext:
        """The same job, in which tensor_size * sequence_size ranks work on the same samples. Every rank calls it.

        Ranks of a tensor-parallel group are neighbours, since these talk the most; then come those of a sequence.
        """
        if tensor_size * sequence_size == 1:
            return self
        grid = torch.arange(self.world_size).reshape(-1, sequence_size, tensor_size)  # [data, sequence, tensor]
        return replace(
            self,
            tensor=self._group_of(grid.reshape(-1, tensor_size)),
            sequence=self._group_of(grid.transpose(1, 2).reshape(-1, sequence_size)),
            model=self._group_of(grid.reshape(-1, sequence_size * tensor_size)),
            data=self._group_of(grid.permute(1, 2, 0).reshape(-1, len(grid))),
        )

    def _group_of(self, rows: torch.Tensor) -> RankGroup:
        """This rank's row of ranks [groups, size]; all ranks make the groups of all rows."""
        found = ALONE
        for ranks in rows.tolist() if rows.shape[1] > 1 else []:
            group = dist.new_group(ranks, timeout=self.timeout)
            if self.rank in ranks:
                found = RankGroup(ranks.index(self.rank), len(ranks), group)
        return found

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_parallel_rank(self) -> int:
        return self.data.rank

    @property
    def data_parallel_size(self) -> int:
        return self.data.size

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and give every rank its result; what it raises of a user's mistake, all ranks raise."""
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except (ValueError, OSError) as raised:
                error = raised if _survives_pickling(raised) else ValueError(str(raised))
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise error
        return result

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a tensor on `device` over the data-parallel ranks, in place."""
        if self.data.process_group is not None:
            dist.all_reduce(values, group=self.data.process_group)
        return values

    def sum_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a tensor on `device` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or self.world_size == 1:
            self.close()
        else:
            _end_without_others(error)


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--nproc_per_node is over {local_rank}, but this node has {torch.cuda.device_count()} visible GPUs: "
            "start one process a GPU"
        )
    return torch.device("cuda", local_rank)


def _end_without_others(error: BaseException) -> None:
    """End this process when it has said what it has to say, and leave its groups as they are: NCCL takes one down
    together with the other ranks, which may be in a collective that this rank will never join."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

    atexit.register(end)


def _survives_pickling(error: Exception) -> bool:
    """Some libraries' errors can't be made of their message alone, as unpickling does."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def die_with_launcher() -> None:
    """No rank outlives a launcher that was killed."""
    if world_size() > 1:
        die_with_parent(os.getppid())
