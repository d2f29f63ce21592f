"""Sequence and tensor parallelism, together and with data parallelism, against one process with plain torch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import nn

from opensora.models.activation import checkpoint_blocks
from opensora.models.lora import LoraStart, plain_name
from opensora.models.mmdit import MMDiT
from opensora.parallel.engine import Engine
from opensora.parallel.sequence import split_sequence

STEPS, LR, BATCH = 5, 0.05, 2
IMAGE, TEXT = 13, 6  # tokens: no length here is divided by 2 or 4


class Layout(NamedTuple):
    tensor: int
    sequence: int
    data: int


LAYOUTS = [Layout(1, 2, 1), Layout(2, 1, 1), Layout(1, 2, 2), Layout(2, 2, 1)]
LAYOUTS += [pytest.param(layout, marks=pytest.mark.slow) for layout in (Layout(1, 4, 1), Layout(2, 1, 2))]


class Case(NamedTuple):
    """What is computed, in one process or many."""

    mode: str = "all_to_all"
    dtype: torch.dtype = torch.float32
    fused_qkv: bool = True
    clip: float = 0.0
    stage: int = 2
    accumulation: int = 1
    recompute: str | None = None
    data: int = 1
    lora: bool = False


def small_model(case: Case) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(
        in_channels=8,
        vec_in_dim=12,
        context_in_dim=20,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        cond_embed=True,
        fused_qkv=case.fused_qkv,
    )
    for parameter in model.parameters():  # none is zero, which would hide its gradient's way
        nn.init.normal_(parameter, std=0.1)
    return model.to(case.dtype)


def inputs_of(step: int, data_rank: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """The model's inputs and its target in one micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + data_rank)

    def normal(*shape):
        return torch.randn(BATCH, *shape, generator=generator).to(dtype)

    ids = torch.arange(IMAGE).float()
    inputs = {
        "img": normal(IMAGE, 8),
        "img_ids": torch.stack([ids // 6, ids % 6, ids % 3], dim=-1).expand(BATCH, -1, -1),
        "txt": normal(TEXT, 20),
        "txt_ids": torch.zeros(BATCH, TEXT, 3),
        "timesteps": torch.rand(BATCH, generator=generator).to(dtype),
        "y_vec": normal(12),
        "cond": normal(IMAGE, 12),
    }
    return inputs, normal(IMAGE, 8).float()


def loss_of(model: nn.Module, inputs: dict, target: torch.Tensor) -> torch.Tensor:
    return (model(**inputs).float() - target).square().mean()


class Found(NamedTuple):
    output: torch.Tensor
    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]  # of the first step
    weights: dict[str, torch.Tensor]  # after the last


def in_one_process(case: Case) -> Found:
    """Plain torch, fp32 weights that are cast for the computation as ZeRO's masters are."""
    masters = {name: p.detach().float() for name, p in small_model(case).named_parameters()}
    model, losses, norms, first, output = small_model(case), [], [], {}, None
    for step in range(STEPS):
        model.zero_grad()
        total = 0.0
        for part in range(case.data * case.accumulation):
            inputs, target = inputs_of(step, part, case.dtype)
            if output is None:
                output = model(**inputs).detach()
            loss = loss_of(model, inputs, target) / (case.data * case.accumulation)
            loss.backward()
            total += loss.item()
        gradients = {name: p.grad.float() for name, p in model.named_parameters()}
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
        scale = min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0
        first = first or gradients
        for name, parameter in model.named_parameters():
            masters[name] -= LR * scale * gradients[name]
            parameter.data.copy_(masters[name])
        losses.append(total)
        norms.append(norm)
    return Found(output, losses, norms, first, masters)


class RecordingSGD(torch.optim.SGD):
    """Remembers the gradients of its first step, before clipping changes those of later ones."""

    first: dict[torch.Tensor, torch.Tensor] | None = None

    def step(self):
        if self.first is None:
            self.first = {p: p.grad.clone() for group in self.param_groups for p in group["params"]}
        super().step()


def adapters() -> LoraStart:
    targets = ["q_proj", "v_proj", "proj", "v_mlp", "linear2", "img_mlp.0", "txt_mlp.2"]
    return LoraStart(LoraConfig(r=3, lora_alpha=6, target_modules=targets, lora_dropout=0.0), None, "base")


def on_ranks(context, layout: Layout, case: Case) -> Found:
    context = context.share_samples(layout.tensor, layout.sequence)
    assert context.data_parallel_size == layout.data
    model = small_model(case)
    split_sequence(model, context.sequence, case.mode)
    if case.recompute:
        checkpoint_blocks(model, None, case.recompute)
    config = {"zero_stage": case.stage}
    torch.manual_seed(1)  # of new adapters
    engine = Engine(
        context,
        model,
        lambda m: RecordingSGD([p for p in m.parameters() if p.requires_grad], lr=LR),
        "hybrid",
        config,
        case.dtype,
        case.clip,
        lora=adapters() if case.lora else None,
    )
    with torch.no_grad():
        output = engine.model(**inputs_of(0, 0, case.dtype)[0])
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(case.accumulation):
            inputs, target = inputs_of(step, micro * layout.data + context.data_parallel_rank, case.dtype)
            loss = engine.forward_backward(
                lambda m, inputs=inputs, target=target: loss_of(m, inputs, target), micro, case.accumulation
            )
            total += loss / (layout.data * case.accumulation)
        norms.append(engine.step(LR))
        losses.append(context.sum(total).item())
    gradients = {} if case.clip else whole(engine, engine.optimizer.optim.first)
    weights = whole(engine, {shard.master: shard.master for shard in engine.shards()})
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(engine.full_parameter(name), weights[plain_name(name)].to(case.dtype), msg=name)
    return Found(output, losses, norms, gradients, weights)


def whole(engine: Engine, of_masters: dict[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors laid out as masters, put together from all ranks' boxes as a checkpoint does."""
    mine = [
        (s.name, s.shape, [(b.offsets, b.sizes, v.clone()) for b, v in s.as_logical(of_masters[s.master]).boxes])
        for s in engine.shards()
        if s.owned
    ]
    found: dict[str, torch.Tensor] = {}
    for shards in engine.context.gather_objects(mine):
        for name, shape, boxes in shards:
            tensor = found.setdefault(name, torch.full(tuple(shape), torch.nan))
            for offsets, sizes, values in boxes:
                place = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                assert place.isnan().all(), f"{name} is written twice"
                place.copy_(values)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def assert_same(found: Found, expected: Found, tolerance: float, gradient_tolerance: float) -> None:
    torch.testing.assert_close(found.output, expected.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.losses, expected.losses, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.norms, expected.norms, atol=tolerance, rtol=tolerance)
    for name, gradient in found.gradients.items():
        error = (gradient - expected.gradients[name]).norm() / expected.gradients[name].norm()
        assert error < gradient_tolerance, f"{name}: {error}"
    for name, weights in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weights, atol=tolerance, rtol=tolerance, msg=name)


def compare(request, layout: Layout, case: Case, tolerance: float, gradient_tolerance: float) -> None:
    size = layout.tensor * layout.sequence * layout.data
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    case = case._replace(data=layout.data)
    expected = in_one_process(case)
    for found in ranks(on_ranks, layout, case):
        assert_same(found, expected, tolerance, gradient_tolerance)


def name_of(layout: Layout) -> str:
    return f"tp{layout.tensor}-sp{layout.sequence}-dp{layout.data}"


@pytest.mark.parametrize("mode", ["all_to_all", "ring_attn"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_equals_one_process(request, layout, mode):
    if layout.sequence == 1 and mode == "ring_attn":
        pytest.skip("no sequence to divide")
    compare(request, layout, Case(mode, fused_qkv=False), 1e-5, 1e-5)


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(2, 2, 1)], ids=name_of)
def test_fused_layers_are_divided_by_segment(request, layout):
    compare(request, layout, Case(fused_qkv=True), 1e-5, 1e-5)


@pytest.mark.parametrize("mode", ["all_to_all", "ring_attn"])
@pytest.mark.parametrize(
    "layout",
    [Layout(1, 2, 1), Layout(2, 1, 1), pytest.param(Layout(2, 2, 1), marks=pytest.mark.slow)],
    ids=name_of,
)
def test_equals_one_process_in_bf16(request, layout, mode):
    compare(request, layout, Case(mode, dtype=torch.bfloat16), 3e-2, 5e-2)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(clip=0.1), marks=pytest.mark.slow),
        Case(clip=0.1, stage=1, accumulation=2),
        pytest.param(Case(accumulation=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_clipping_and_accumulation(request, case):
    compare(request, Layout(2, 2, 1), case, 1e-5, 1e-5)


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 2, 1)], ids=name_of)
def test_adapters(request, one_rank, layout):
    """Down-projections of divided outputs are whole and see a part of the gradient, and so on: all is tried here."""
    case = Case(fused_qkv=False, lora=True, clip=0.1)
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[layout.tensor * layout.sequence])
    (expected,) = one_rank(on_ranks, Layout(1, 1, 1), case)
    for found in ranks(on_ranks, layout, case):
        assert_same(found, expected, 1e-5, 1e-5)


@pytest.mark.parametrize("policy", ["full", "attention"])
@pytest.mark.parametrize("mode", ["all_to_all", "ring_attn"])
def test_recomputation(request, mode, policy):
    compare(request, Layout(1, 2, 1), Case(mode, recompute=policy), 1e-5, 1e-5)
