"""One model on many ranks against one process: the gradients of a step, and their norm.

torchrun --nproc_per_node 4 benchmarks/parity.py --tp 2 --sp 2 --dp 1
torchrun --nproc_per_node 2 benchmarks/parity.py --tp 1 --sp 2 --dp 1 --mode ring_attn

Rank 0 computes the whole batch once more by itself, without any of what divides it: fp32, plain torch. Text and image
have odd numbers of tokens, so no part is like another. The last line is a JSON object; grad_rel_err is the largest over
the parameters of |g - g'| / |g'|, grad_norm_ratio the norm that the ranks report over the single process's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.models.mmdit import MMDiT  # noqa: E402 - the repository need not be installed
from opensora.parallel.context import ParallelContext  # noqa: E402
from opensora.parallel.engine import Engine  # noqa: E402
from opensora.parallel.sequence import MODES, split_sequence  # noqa: E402

HIDDEN, HEADS, DEPTH, SINGLE, PATCH_FEATURES, TEXT_WIDTH, VECTOR = 128, 8, 2, 2, 16, 32, 24
BATCH, IMAGE, TEXT = 2, 67, 19


def build(device: torch.device, dtype: torch.dtype = torch.float32) -> MMDiT:
    """The same model on every rank; no weight is zero, which would hide the gradients behind it."""
    torch.manual_seed(0)
    model = MMDiT(
        in_channels=PATCH_FEATURES,
        vec_in_dim=VECTOR,
        context_in_dim=TEXT_WIDTH,
        hidden_size=HIDDEN,
        mlp_ratio=4.0,
        num_heads=HEADS,
        depth=DEPTH,
        depth_single_blocks=SINGLE,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        fused_qkv=False,
        use_liger_rope=True,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(device, dtype)


def batch_of(data_rank: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[dict, Tensor]:
    """(inputs, target) of a data-parallel rank."""
    generator = torch.Generator().manual_seed(data_rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(device, dtype)

    places = torch.arange(IMAGE, device=device)
    ids = torch.stack([places // 16, places // 4 % 4, places % 4], dim=-1).float()  # [L, 3]
    inputs = {
        "img": normal(IMAGE, PATCH_FEATURES),
        "img_ids": ids.expand(BATCH, -1, -1),
        "txt": normal(TEXT, TEXT_WIDTH),
        "txt_ids": torch.zeros(BATCH, TEXT, 3, device=device),
        "timesteps": torch.rand(BATCH, generator=generator).to(device, dtype),
        "y_vec": normal(VECTOR),
    }
    return inputs, normal(IMAGE, PATCH_FEATURES).float()


def loss_of(model: nn.Module, inputs: dict[str, Tensor], target: Tensor) -> Tensor:
    return (model(**inputs).float() - target).square().mean()


class Gradients(NamedTuple):
    by_name: dict[str, Tensor]  # whole, on the host
    norm: float


def on_one_rank(data_ranks: int, device: torch.device) -> Gradients:
    model = build(device)
    for rank in range(data_ranks):
        (loss_of(model, *batch_of(rank, device)) / data_ranks).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    return Gradients(gradients, torch.stack([g.double().norm() for g in gradients.values()]).norm().item())


class KeepGradients(torch.optim.SGD):
    """Does not update: keeps the gradients of ZeRO's masters."""

    def step(self) -> None:
        self.kept = {p: p.grad.clone() for group in self.param_groups for p in group["params"]}


def on_all_ranks(context: ParallelContext, mode: str) -> Gradients:
    model = build(context.device)
    split_sequence(model, context.sequence, mode)
    make_optimizer = lambda m: KeepGradients(m.parameters(), lr=0.0)  # noqa: E731
    engine = Engine(context, model, make_optimizer, "hybrid", {"zero_stage": 2}, torch.float32, 0.0)
    inputs, target = batch_of(context.data_parallel_rank, context.device)
    engine.forward_backward(lambda m: loss_of(m, inputs, target))
    norm = engine.step(0.0)
    kept = engine.optimizer.optim.kept
    mine = [
        (s.name, s.shape, [(b.offsets, b.sizes, v.cpu()) for b, v in s.as_logical(kept[s.master]).boxes])
        for s in engine.shards()
        if s.owned
    ]
    whole: dict[str, Tensor] = {}
    for shards in context.gather_objects(mine):
        for name, shape, boxes in shards:
            gradient = whole.setdefault(name, torch.full(tuple(shape), torch.nan))
            for offsets, sizes, values in boxes:
                gradient[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = values
    return Gradients(whole, norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layout(parser)
    args = parser.parse_args()
    context = join(args)
    found, expected = on_all_ranks(context, args.mode), on_one_rank(args.dp, context.device)
    errors = {
        name: ((found.by_name[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in expected.by_name.items()
    }
    result = {
        "tp": args.tp,
        "sp": args.sp,
        "dp": args.dp,
        "mode": args.mode,
        "grad_rel_err": max(errors.values()),
        "worst": max(errors, key=errors.get),
        "parameters": len(errors),
        "grad_norm_ratio": found.norm / expected.norm,
        **describe_machine("torch", "colossalai", device=context.device.type),
    }
    if context.is_main:
        print(json.dumps(result))
    context.close()


def add_layout(parser: argparse.ArgumentParser) -> None:
    for name, doc in (("tp", "tensor-parallel"), ("sp", "sequence-parallel"), ("dp", "data-parallel")):
        parser.add_argument(f"--{name}", type=int, default=1, help=f"{doc} ranks")
    parser.add_argument("--mode", choices=MODES, default="all_to_all", help="how attention sees the whole sequence")


def join(args: argparse.Namespace) -> ParallelContext:
    context = ParallelContext.create(300)
    needed = args.tp * args.sp * args.dp
    if context.world_size != needed:
        raise SystemExit(f"--tp {args.tp} --sp {args.sp} --dp {args.dp} need {needed} ranks: --nproc_per_node {needed}")
    return context.share_samples(args.tp, args.sp)


if __name__ == "__main__":
    main()
