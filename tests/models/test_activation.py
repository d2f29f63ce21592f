import copy

import pytest
import torch

from opensora.models.activation import checkpoint_blocks


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def forward_calls(model, inputs):
    """How often the attention of each block runs in a forward and backward pass."""
    blocks = [*model.double_blocks, *model.single_blocks]
    counts = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def counted(q, k, v, index=index, attend=block.attention):
            counts[index] += 1
            return attend(q, k, v)

        block.attention = counted
    gradients(model, inputs)
    return counts


@pytest.mark.parametrize(
    "setting, calls",
    [
        (None, [2, 2, 2, 2, 2]),
        ((8, 100), [2, 2, 2, 2, 2]),
        ([1, 2], [2, 1, 2, 2, 1]),
        ((0, 1), [1, 1, 2, 1, 1]),
        ((0, 0), [1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(small_mmdit, small_inputs, setting, calls, dtype):
    model = small_mmdit(cond_embed=True).to(dtype)
    inputs = {k: v if v is None else v.to(dtype) for k, v in small_inputs(model).items()}
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(model, inputs)
    checkpoint_blocks(model, setting)
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    found = gradients(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert forward_calls(model, inputs) == calls


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


def test_saves_memory(small_mmdit, small_inputs):
    """Counted, not measured: bytes that autograd keeps for the backward pass."""

    def saved_bytes(setting):
        model = small_mmdit()
        checkpoint_blocks(model, setting)
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**small_inputs(model, batch=8))
        assert output.requires_grad
        return sum(kept.values())

    none, some, all_blocks = saved_bytes((0, 0)), saved_bytes((1, 1)), saved_bytes(None)
    assert all_blocks < some < none
    assert all_blocks < 0.5 * none


@pytest.mark.parametrize("setting", [(8,), (1, 2, 3), (-1, 2), ("all", 1), (1.5, 2)])
def test_wrong_settings(small_mmdit, setting):
    with pytest.raises(ValueError, match=r"model.grad_ckpt_settings=.* must be two counts"):
        checkpoint_blocks(small_mmdit(), setting)
