import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.models.activation import checkpoint_blocks, is_attention

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def forward_calls(model, inputs):
    """How often each block's attention is called in a forward and backward pass."""
    blocks = [*model.double_blocks, *model.single_blocks]
    counts = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def counted(q, k, v, index=index, attend=block.attention):
            counts[index] += 1
            return attend(q, k, v)

        block.attention = counted
    gradients(model, inputs)
    return counts


class KernelCalls(TorchDispatchMode):
    """Counts the operators that really run."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def saved_bytes(small_mmdit, small_inputs, *setting):
    """Counted, not measured: bytes that autograd keeps for the backward pass."""
    model = small_mmdit()
    checkpoint_blocks(model, *setting)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**small_inputs(model, batch=8))
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "setting, calls",
    [
        ((None,), [2, 2, 2, 2, 2]),
        (((8, 100),), [2, 2, 2, 2, 2]),
        (([1, 2], "blocks"), [2, 1, 2, 2, 1]),
        (((0, 1), "attention"), [1, 1, 2, 1, 1]),
        (((0, 0),), [1, 1, 1, 1, 1]),
        (((0, 0), "full"), [2, 2, 2, 2, 2]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(small_mmdit, small_inputs, setting, calls, dtype):
    model = small_mmdit(cond_embed=True).to(dtype)
    inputs = {k: v if v is None else v.to(dtype) for k, v in small_inputs(model).items()}
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(model, inputs)
    checkpoint_blocks(model, *setting)
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    found = gradients(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert forward_calls(model, inputs) == calls


def test_the_blocks_that_are_recomputed_are_returned(small_mmdit):
    model = small_mmdit()
    assert checkpoint_blocks(model, (1, 2)) == [model.double_blocks[0], *model.single_blocks[:2]]
    assert checkpoint_blocks(model, (0, 0)) == []
    assert checkpoint_blocks(model, (0, 0), "full") == [*model.double_blocks, *model.single_blocks]


def test_second_call_replaces_the_first(small_mmdit, small_inputs):
    model = small_mmdit()
    checkpoint_blocks(model, None)
    checkpoint_blocks(model, None)
    checkpoint_blocks(model, (1, 0))
    assert forward_calls(model, small_inputs(model)) == [2, 1, 1, 1, 1]


def test_a_copy_recomputes_its_own_blocks(small_mmdit, small_inputs):
    model = small_mmdit()
    checkpoint_blocks(model, None)
    twin = copy.deepcopy(model)
    inputs = small_inputs(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(twin(**inputs), model(**inputs))
    gradients(twin, inputs)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("policy, kernels", [("blocks", 10), ("attention", 5)])
def test_the_attention_policy_runs_no_attention_kernel_again(small_mmdit, small_inputs, policy, kernels):
    model = small_mmdit()
    checkpoint_blocks(model, None, policy)
    with KernelCalls() as calls:
        gradients(model, small_inputs(model))
    assert calls.counts[ATTENTION] == kernels


def test_the_attention_policy_knows_operators_of_other_packages(small_mmdit, small_inputs):
    """An attention registered as a custom operator, as flash-attn's are."""
    runs = []

    @torch.library.custom_op("opensora_test::ring_attention", mutates_args=())
    def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        runs.append(len(q))
        return ((q @ k.mT).softmax(-1) @ v).clone()

    def backward(context, grad):
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in context.saved_tensors)
            return torch.autograd.grad((q @ k.mT).softmax(-1) @ v, (q, k, v), grad)

    ring_attention.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    model = small_mmdit()
    for block in (*model.double_blocks, *model.single_blocks):
        block.attention = lambda q, k, v: ring_attention(q, k, v).transpose(1, 2).flatten(2)
    inputs = small_inputs(model)
    expected = gradients(model, inputs)
    for policy, count in (("blocks", 10), ("attention", 5)):
        checkpoint_blocks(model, None, policy)
        runs.clear()
        found = gradients(model, inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(runs) == count


def test_attention_kernels_by_name():
    aten = torch.ops.aten
    fused = [name for name in dir(aten) if name.startswith("_scaled_dot_product") and "backward" not in name]
    assert len(fused) >= 5
    assert all(is_attention(getattr(aten, name).default) for name in fused)
    others = (aten.addmm, aten.native_layer_norm, aten.gelu, aten._softmax, aten.bmm)
    assert not any(is_attention(op.default) for op in others)


def test_saves_memory(small_mmdit, small_inputs):
    def saved(*setting):
        return saved_bytes(small_mmdit, small_inputs, *setting)

    none, some, all_blocks = saved((0, 0)), saved((1, 1)), saved(None)
    assert all_blocks < some < none
    assert all_blocks < 0.5 * none
    assert saved((0, 0), "full") == all_blocks


def test_the_benchmark_measures_what_the_formulas_say():
    """Bytes per token and block: the input in bf16, with "attention" its output and the fp32 log-sum-exp of each head;
    beside them one rotary table of all blocks and the state of the random generator of each."""
    path = Path(__file__).parents[2] / "benchmarks/activation_memory.py"
    spec = importlib.util.spec_from_file_location("activation_memory", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    hidden, tokens, depth = 128, 192, 1
    sizes = f"--device cpu --hidden-size {hidden} --tokens {tokens} --text-tokens 64 --depth {depth} --repeats 1"
    found = benchmark.measure(benchmark.parse_arguments(sizes.split()))
    held = {name: row["bytes_per_token_and_block"] for name, row in found.items()}
    beside = 2 * 64 * 4 / (3 * depth) + torch.get_rng_state().nbytes / tokens
    assert held["full"] == pytest.approx(2 * hidden + beside, abs=1)
    assert held["attention"] == pytest.approx(held["full"] + 2 * hidden + 4, abs=1)
    assert held["full, offload"] == pytest.approx(held["full"] - 2 * hidden / 3, abs=1)  # the last two are on their way
    assert held["full"] < held["blocks (0, 1)"] < held["none"]
    assert all(row["peak_bytes"] > row["held_bytes"] for row in found.values())


@pytest.mark.parametrize("setting", [(8,), (1, 2, 3), (-1, 2), ("all", 1), (1.5, 2)])
def test_wrong_settings(small_mmdit, setting):
    with pytest.raises(ValueError, match=r"model.grad_ckpt_settings=.* must be two counts"):
        checkpoint_blocks(small_mmdit(), setting)


def test_wrong_policy(small_mmdit):
    with pytest.raises(ValueError, match=r"model.grad_ckpt_policy='half' is unknown: one of full, blocks, attention"):
        checkpoint_blocks(small_mmdit(), None, "half")
