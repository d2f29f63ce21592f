"""A pool of processes that stay joined in one process group and run functions together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """`ranks(function, *args)` runs `function(context, *args)` on every rank and returns the results by rank."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        spawn = mp.get_context("spawn")
        # Held here, as by a torchrun: a port that is looked for first and bound by a rank later may be taken by then.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, world_size, self._store.port, theirs))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(300), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for rank, (failure, _) in enumerate(answers):  # when all have been read: one left would be the next call's
            assert failure is None, f"rank {rank}:\n{failure}"
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)


def _serve(rank: int, world_size: int, port: int, pipe) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    import torch

    from opensora.parallel.context import ParallelContext

    torch.set_num_threads(1)
    context = ParallelContext.create(240)
    known = set(dist.distributed_c10d._world.pg_map)
    while (task := pipe.recv()) is not None:
        for group in set(dist.distributed_c10d._world.pg_map) - known:
            dist.destroy_process_group(group)  # of the last task: each has threads that wake up all the time
        function, args = task
        try:
            pipe.send((None, function(context, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    context.close()
