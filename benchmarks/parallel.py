"""Bytes that each rank sends in a training step, against what its layout can't do without.

torchrun --nproc_per_node 4 benchmarks/parallel.py --tp 2 --sp 2 --dp 1
torchrun --nproc_per_node 4 benchmarks/parallel.py --tp 1 --sp 4 --dp 1 --mode ring_attn

The model and its batch are those of parity.py, in bf16. What is sent is counted where torch.distributed hands it to its
backends, by the least that a collective of n bytes over p ranks can send: all_reduce 2 n (p - 1) / p, all_gather (of
the result) and reduce_scatter (of the input) n (p - 1) / p, all_to_all what is not its own. The last line is a JSON
object; ratio is sent / minimum. The minimum, for H hidden features and N tokens of b bytes in the batch, is

    ZeRO-2         this rank's part of the weights once as gradients, reduced and scattered, and once gathered
    tensor         N H b, all-reduced twice for a double block and once for a single one, in each of both passes
    all_to_all     q, k, v and the result of each block, in each of both passes
    ring_attn      k and v of the other ranks, in each of both passes, and their gradients in fp32
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.parity import (  # noqa: E402
    BATCH,
    DEPTH,
    HIDDEN,
    IMAGE,
    SINGLE,
    TEXT,
    add_layout,
    batch_of,
    build,
    join,
    loss_of,
)
from opensora.parallel.context import ParallelContext  # noqa: E402
from opensora.parallel.engine import Engine  # noqa: E402
from opensora.parallel.sequence import split_sequence  # noqa: E402

DTYPE = torch.bfloat16
BYTES = DTYPE.itemsize


class SentBytes(TorchDispatchMode):
    """Counts what the collectives called within it send from this rank, by kind."""

    def __init__(self):
        super().__init__()
        self.by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, kind: str, args) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        ranks = group.size()
        others = (ranks - 1) / ranks
        if kind == "allreduce_":
            self.by_kind["all_reduce"] += round(2 * others * sum(t.nbytes for t in args[0]))
        elif kind in ("_allgather_base_", "allgather_"):
            self.by_kind["all_gather"] += round(others * _nbytes(args[0]))
        elif kind in ("_reduce_scatter_base_", "reduce_scatter_"):
            self.by_kind["reduce_scatter"] += round(others * _nbytes(args[1]))
        elif kind == "alltoall_base_":
            own = args[4][group.rank()] / args[1].shape[0] if args[4] else 1 / ranks
            self.by_kind["all_to_all"] += round(args[1].nbytes * (1 - own))
        elif kind == "send":
            self.by_kind["send"] += _nbytes(args[0])
        elif kind not in ("recv_", "barrier"):
            raise NotImplementedError(f"a collective that is not counted here: {kind}")


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("ProcessGroup")


def _nbytes(value) -> int:
    return value.nbytes if torch.is_tensor(value) else sum(map(_nbytes, value))


def least(context: ParallelContext, weights: int, mode: str) -> dict[str, float]:
    """Bytes that this rank has to send, by purpose. weights: parameters that it holds."""
    tensor, sequence = context.tensor.size, context.sequence.size
    zero = context.world_size // tensor
    tokens = BATCH * (IMAGE + TEXT) / sequence  # of this rank
    blocks, features = DEPTH + SINGLE, HIDDEN / tensor
    found = {"zero": 2 * weights * BYTES * (zero - 1) / zero}
    found["tensor"] = 2 * (2 * DEPTH + SINGLE) * tokens * HIDDEN * BYTES * 2 * (tensor - 1) / tensor
    if mode == "all_to_all":
        found["sequence"] = 2 * blocks * 4 * tokens * features * BYTES * (sequence - 1) / sequence
    else:
        found["sequence"] = blocks * 2 * tokens * features * (sequence - 1) * (2 * BYTES + 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layout(parser)
    args = parser.parse_args()
    context = join(args)
    model = build(context.device, DTYPE)
    split_sequence(model, context.sequence, args.mode)
    make_optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.01)  # noqa: E731
    engine = Engine(context, model, make_optimizer, "hybrid", {"zero_stage": 2}, DTYPE, 1.0)
    inputs, target = batch_of(context.data_parallel_rank, context.device, DTYPE)
    with SentBytes() as sent:
        engine.forward_backward(lambda m: loss_of(m, inputs, target))
        engine.step(0.01)
    minimum = least(context, sum(p.numel() for p in engine.module.parameters()), args.mode)
    result = {
        "tp": args.tp,
        "sp": args.sp,
        "dp": args.dp,
        "mode": args.mode,
        "sent": dict(sent.by_kind),
        "minimum": {name: round(count) for name, count in minimum.items() if count},
        "ratio": sum(sent.by_kind.values()) / sum(minimum.values()) if sum(minimum.values()) else None,
        **describe_machine("torch", "colossalai", device=context.device.type),
    }
    if context.is_main:
        print(json.dumps(result))
    context.close()


if __name__ == "__main__":
    main()
