"""Inputs of recomputed blocks in host memory: the same gradients, and every byte of the buffer free again."""

import copy
import gc
import itertools
import logging
import random
import weakref

import pytest
import torch

from opensora.models.activation import checkpoint_blocks
from opensora.models.offload import offload_inputs
from opensora.parallel.offload import ALIGNMENT, LEAVING, HostBuffer

CPU = torch.device("cpu")
AMPLE = 1 << 20
POLICIES = [(None, "full"), *itertools.product([(1, 1), (2, 0)], ["blocks", "attention"])]
SHAPES = ({}, {"frames": 3, "text": 2}, {"batch": 1, "rows": 4, "text": 7})


@pytest.fixture(autouse=True)
def no_garbage_collection():
    """Memory has to be free as soon as nobody holds it: training collects garbage only now and then."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def offloaded(model, size=AMPLE, setting=None, policy="blocks", device=CPU):
    buffer = HostBuffer(size, device)
    offload_inputs(checkpoint_blocks(model, setting, policy), buffer)
    return buffer


def cast(inputs, dtype):
    """In `dtype`, and as inputs whose gradients are asked for."""
    inputs = {name: value if value is None else value.to(dtype) for name, value in inputs.items()}
    for name in ("img", "txt", "y_vec"):
        inputs[name].requires_grad_()
    return inputs


def gradients(model, *batches):
    """Of all parameters and inputs, added over the micro-batches."""
    model.zero_grad()
    for inputs in batches:
        for value in inputs.values():
            if value is not None:
                value.grad = None
        model(**inputs).float().square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for i, inputs in enumerate(batches):
        found |= {f"{name} of batch {i}": inputs[name].grad for name in ("img", "txt", "y_vec")}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def input_bytes(model, inputs, double, single):
    """Bytes of the hidden states that enter the first blocks of each kind."""
    tokens = inputs["img"].shape[0] * (inputs["img"].shape[1] + inputs["txt"].shape[1])
    width = model.img_in.out_features * model.img_in.weight.element_size()
    return (double + single) * tokens * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(small_mmdit, small_inputs, dtype):
    """Every setting, with room for all, some and none of the inputs; micro-batches of other shapes, added up."""
    model = small_mmdit(cond_embed=True, depth_single_blocks=2).to(dtype)
    batches = [cast(small_inputs(model, **shape), dtype) for shape in SHAPES]
    expected = gradients(model, *batches)
    for chosen, size in itertools.product(POLICIES, [1, 1 << 12, AMPLE]):
        buffer = offloaded(model, size, *chosen)
        assert_equal(gradients(model, *batches), expected)
        assert buffer.used == 0


class LateCopies:
    """A side stream at its slowest: a copy is made when somebody waits for it, after those that were started before.

    As on a device, nobody but the buffer's user keeps the device's memory alive for it, and what a copy will bring is
    not there before.
    """

    def __init__(self, host_bytes):
        self.host_bytes, self.queue, self.made = host_bytes, [], 0

    def start(self, target, source):
        device = source if target.untyped_storage().nbytes() == self.host_bytes else target
        if device is target:
            target.fill_(torch.nan)
        memory = weakref.ref(device.untyped_storage())
        layout = (device.storage_offset(), device.shape, device.stride())
        self.queue.append((memory, layout, source if device is target else target, device is target))
        return len(self.queue)

    def wait(self, copied):
        for memory, layout, host, to_device in self.queue[self.made : copied]:
            assert memory() is not None, "the device's memory was given up before it was copied"
            device = torch.empty(0, dtype=host.dtype).set_(memory(), *layout)
            device.copy_(host) if to_device else host.copy_(device)
        self.made = max(self.made, copied)


@pytest.mark.parametrize("size", [1 << 14, 1 << 15, AMPLE])
def test_copies_that_end_as_late_as_they_may(small_mmdit, small_inputs, size):
    model = small_mmdit()
    batches = [cast(small_inputs(model, **shape), torch.float32) for shape in SHAPES]
    expected = gradients(model, *batches)
    for policy in ("blocks", "attention"):
        buffer = offloaded(model, size, policy=policy)
        buffer.copies = LateCopies(size)
        for _ in range(2):
            model(**batches[0])  # no backward
            assert_equal(gradients(model, *batches), expected)
        assert buffer.used == 0 and buffer.copies.made > 20


@pytest.mark.parametrize("variant", [{"fused_qkv": True, "use_liger_rope": False}, {"depth": 0}, {"depth": 1}])
def test_other_models(small_mmdit, small_inputs, variant):
    model = small_mmdit(**variant)
    inputs = cast(small_inputs(model), torch.float32)
    expected = gradients(model, inputs)
    offloaded(model)
    assert_equal(gradients(model, inputs), expected)


def test_frozen_weights(small_mmdit, small_inputs):
    """As with adapters: what enters the first block needs no gradient."""
    model = small_mmdit().requires_grad_(False)
    for block in (*model.double_blocks, *model.single_blocks):
        (block.linear2 if hasattr(block, "linear2") else block.img_attn.proj).requires_grad_(True)
    inputs = small_inputs(model)

    def run():
        model.zero_grad()
        model(**inputs).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = run()
    for policy in ("blocks", "attention"):
        offloaded(model, policy=policy)
        assert_equal(run(), expected)


@pytest.mark.parametrize("setting, blocks", [(None, (2, 3)), ((1, 2), (1, 2)), ((0, 1), (0, 1))])
def test_hidden_states_and_nothing_else_wait_in_the_buffer(small_mmdit, small_inputs, setting, blocks):
    model = small_mmdit()
    buffer = offloaded(model, setting=setting)
    inputs = small_inputs(model)
    loss = model(**inputs).sum()
    assert buffer.used == input_bytes(model, inputs, *blocks)
    loss.backward()
    assert buffer.used == 0


def test_what_does_not_fit_stays_and_is_said_once(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    size = input_bytes(model, inputs, 2, 1)
    buffer = offloaded(model, size + 1)
    logger, lines = logging.getLogger("opensora"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    for _ in range(2):
        loss = model(**inputs).sum()
        assert buffer.used == size
        loss.backward()
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert lines == [f"grad_ckpt_buffer_size={size + 1} is full: what does not fit stays on the device"]


def test_evaluation_stores_nothing(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)
        buffer = offloaded(model)
        assert torch.equal(model(**inputs), expected)
    assert buffer.used == 0


def test_a_forward_without_a_backward_leaves_nothing(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = cast(small_inputs(model), torch.float32)
    expected = gradients(model, inputs)
    buffer = offloaded(model)
    output = model(**inputs)
    assert buffer.used > 0
    del output
    assert buffer.used == 0
    assert_equal(gradients(model, inputs), expected)


@pytest.mark.parametrize("policy", ["blocks", "attention"])
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_an_error_leaves_nothing(small_mmdit, small_inputs, during, policy):
    model = small_mmdit()
    inputs = cast(small_inputs(model), torch.float32)
    expected = gradients(model, inputs)
    buffer = offloaded(model, policy=policy)
    block = model.single_blocks[1]
    attend, calls = block.attention, []

    def fails(q, k, v):
        calls.append(None)
        if len(calls) == (1 if during == "forward" else 2):
            raise FloatingPointError("on purpose")
        return attend(q, k, v)

    block.attention = fails
    with pytest.raises(FloatingPointError):
        gradients(model, inputs)
    block.attention = attend
    gc.collect()  # a traceback holds frames, and they the graph
    assert buffer.used == 0
    assert_equal(gradients(model, inputs), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_graphs_at_once(small_mmdit, small_inputs, order):
    model = small_mmdit()
    batches = [small_inputs(model), small_inputs(model, frames=3)]

    def run():
        model.zero_grad()
        losses = [model(**inputs).square().mean() for inputs in batches]
        for i in order:
            losses[i].backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = run()
    buffer = offloaded(model)
    assert_equal(run(), expected)
    assert buffer.used == 0


def test_a_second_backward_through_the_same_graph(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)

    def run():
        model.zero_grad()
        loss = model(**inputs).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = run()
    buffer = offloaded(model)
    assert_equal(run(), expected)
    assert buffer.used == 0


def test_a_copy_of_the_model_is_on_its_own(small_mmdit, small_inputs):
    model = small_mmdit()
    inputs = small_inputs(model)
    buffer = offloaded(model)
    twin = copy.deepcopy(model)
    loss, twin_loss = model(**inputs).sum(), twin(**inputs).sum()
    assert buffer.used == 2 * input_bytes(model, inputs, 2, 3)
    twin_loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_checkpointing_anew_ends_it(small_mmdit, small_inputs):
    model = small_mmdit()
    buffer = offloaded(model)
    checkpoint_blocks(model, None)
    output = model(**small_inputs(model))
    assert output.requires_grad and buffer.used == 0


def test_inputs_come_back_one_block_ahead(small_mmdit, small_inputs):
    """The order of copies and of computation, by what a copy moves: 12 image, 5 text, or 17 tokens."""
    model = small_mmdit()
    buffer = offloaded(model)
    events = []
    start = buffer.copies.start

    def recorded_start(target, source):
        events.append(("out" if target.untyped_storage().nbytes() == AMPLE else "back", target.shape[1]))
        return start(target, source)

    buffer.copies.start = recorded_start
    for index, block in enumerate([*model.double_blocks, *model.single_blocks]):

        def recorded(q, k, v, index=index, attend=block.attention):
            events.append(("attend", index))
            return attend(q, k, v)

        block.attention = recorded
    output = model(**small_inputs(model))
    double, single = [("out", 12), ("out", 5)], [("out", 17)]
    runs = [("attend", index) for index in range(5)]
    assert events == [*double, runs[0], *double, runs[1], *single, runs[2], *single, runs[3], *single, runs[4]]
    events.clear()
    output.sum().backward()
    # the last two are still on the device; of the others each is under way before the block after it is computed
    back = [("back", 12), ("back", 5)]
    assert events == [runs[4], ("back", 17), runs[3], *back, runs[2], *back, runs[1], runs[0]]


def test_under_compiled_blocks(small_mmdit, small_inputs):
    """Checkpoint, compile, offload, in this order: the hooks stay outside of the graph and find the same tensors."""
    model = small_mmdit(depth=0, depth_single_blocks=1)
    inputs = small_inputs(model)
    expected = parameter_gradients(model, inputs)
    blocks = checkpoint_blocks(model, None, "attention")
    for block in blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)
    buffer = HostBuffer(AMPLE, CPU)
    offload_inputs(blocks, buffer)
    loss = model(**inputs).square().mean()
    assert buffer.used == input_bytes(model, inputs, 0, 1)
    del loss
    torch.testing.assert_close(parameter_gradients(model, inputs), expected, atol=1e-5, rtol=1e-4)
    assert buffer.used == 0


# ---------------------------------------------------------------------------------------------------- the buffer


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5, 7),
        torch.randn(3, 5, 7, dtype=torch.bfloat16).transpose(0, 2),
        torch.randn(6, 10, 7)[::2, 1:9:3],
        torch.randn(3, 1, 7).expand(3, 5, 7),
        torch.arange(11, dtype=torch.uint8),
        torch.randn(()),
    ],
)
def test_a_stored_tensor_comes_back_as_it_was(tensor):
    buffer = HostBuffer(AMPLE, CPU)
    values, strides = tensor.clone(), torch.empty_like(tensor).stride()
    stored = buffer.store(tensor)
    others = [buffer.store(torch.randn(9)) for _ in range(LEAVING)]
    assert buffer.used >= tensor.nbytes
    for _ in range(2):
        found = stored.take()
        assert found.data_ptr() != tensor.data_ptr()
        assert torch.equal(found, values) and found.dtype == values.dtype and found.stride() == strides
    del stored, others
    assert buffer.used == 0


def test_the_devices_memory_is_given_up():
    buffer = HostBuffer(AMPLE, CPU)
    tensors = [torch.randn(9) for _ in range(2 * LEAVING)]
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    stored = [buffer.store(tensor) for tensor in tensors]
    del tensors
    assert [ref() is not None for ref in alive] == [False] * LEAVING + [True] * LEAVING
    taken = stored[-1].take()
    assert taken.untyped_storage() is alive[-1]()
    del taken, stored
    assert [ref() for ref in alive] == [None] * 2 * LEAVING


def test_places_never_overlap():
    """Random stores and frees against the values that should be there."""
    buffer, draw = HostBuffer(64 * ALIGNMENT, CPU), random.Random(0)
    held, refused = [], 0
    for step in range(2000):
        if held and draw.random() < 0.45:
            stored, value, count = held.pop(draw.randrange(len(held)))
            assert torch.equal(stored.take(), torch.full((count,), value))
            continue
        count = draw.randint(1, 8 * ALIGNMENT)
        stored = buffer.store(torch.full((count,), step % 251, dtype=torch.uint8))
        if stored is None:
            refused += 1
        else:
            held.append((stored, torch.tensor(step % 251, dtype=torch.uint8), count))
        assert buffer.used == sum(-(-n // ALIGNMENT) * ALIGNMENT for _, _, n in held) <= buffer.size
    assert refused > 100
    del stored
    held.clear()
    assert buffer.used == 0


def test_a_gap_in_the_middle_is_used():
    buffer = HostBuffer(3 * ALIGNMENT, CPU)
    first, second, third = (buffer.store(torch.full((ALIGNMENT,), i, dtype=torch.uint8)) for i in range(3))
    assert buffer.store(torch.zeros(1)) is None
    del second
    assert buffer.store(torch.zeros(ALIGNMENT)) is None
    second = buffer.store(torch.full((ALIGNMENT,), 7, dtype=torch.uint8))
    assert [stored.take()[-1].item() for stored in (first, second, third)] == [0, 7, 2]


def test_more_than_the_host_has():
    with pytest.raises(ValueError, match=r"grad_ckpt_buffer_size=\d+: this host does not give each process \d+.0 GiB"):
        HostBuffer(1 << 60, CPU)


# ------------------------------------------------------------------------------------------------------- on CUDA


def cuda_model(small_mmdit, **changes):
    """Blocks whose inputs (32 MiB in bf16 at 16384 tokens) take longer to copy than the smallest kernels to run."""
    settings = {"hidden_size": 1024, "num_heads": 8, "axes_dim": [32, 48, 48], "mlp_ratio": 2.0, **changes}
    return small_mmdit(**settings).to("cuda", torch.bfloat16)


def cuda_inputs(small_inputs, model, **shape):
    return {name: v if v is None else v.to("cuda", torch.bfloat16) for name, v in small_inputs(model, **shape).items()}


def parameter_gradients(model, *batches):
    model.zero_grad()
    for inputs in batches:
        model(**inputs).float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["full", "blocks", "attention"])
def test_cuda_gradients_are_the_same_bits(small_mmdit, small_inputs, policy):
    """With torch's plain attention: the backward passes of the others add up in any order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.device("cpu"):
        model = cuda_model(small_mmdit, depth=2, depth_single_blocks=6)
    batches = [
        cuda_inputs(small_inputs, model, batch=1, frames=2, rows=16, columns=columns, text=512) for columns in (16, 24)
    ]
    with sdpa_kernel(SDPBackend.MATH):
        expected = parameter_gradients(model, *batches)
        for size in (1 << 20, 16 << 20, 1 << 30):
            buffer = offloaded(model, size, policy=policy, device=torch.device("cuda"))
            assert buffer._bytes.is_pinned()
            for _ in range(4):
                assert_equal(parameter_gradients(model, *batches), expected)
                assert buffer.used == 0


@pytest.mark.gpu
def test_cuda_copies_that_lag_behind():
    """A buffer that is used at once again, with nothing to compute meanwhile: every value survives the trip."""
    device = torch.device("cuda")
    buffer = HostBuffer(512 << 20, device)
    for step in range(8):
        stored = []
        for i in range(16):
            tensor = torch.full((32 << 20,), (16 * step + i) % 251, dtype=torch.uint8, device=device)
            stored.append(buffer.store(tensor))
            del tensor
        assert all(stored) and buffer.used == buffer.size
        for i in reversed(range(16)):
            found = stored[i].take()
            if i:
                stored[i - 1].prefetch()
            assert bool((found == (16 * step + i) % 251).all())
            found.fill_(255)  # what is taken is the caller's
            del found, stored[i]
        assert buffer.used == 0


@pytest.mark.gpu
def test_cuda_keeps_only_what_is_under_way(small_mmdit, small_inputs):
    """Bytes after the forward pass, and the largest of the whole step, with and without the host's memory."""
    model = cuda_model(small_mmdit, depth=0, depth_single_blocks=12)
    inputs = cuda_inputs(small_inputs, model, batch=1, frames=16, rows=32, columns=31, text=512)
    parameter_gradients(model, inputs)

    def measure():
        model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        loss = model(**inputs).float().square().mean()
        held = torch.cuda.memory_allocated() - start
        loss.backward()
        return held, torch.cuda.max_memory_allocated() - start

    block_input = (16 * 32 * 31 + 512) * 1024 * 2
    checkpoint_blocks(model, None)
    measure()
    held, peak = measure()
    assert held >= 12 * block_input
    offloaded(model, 12 * block_input, device=torch.device("cuda"))
    measure()
    held_less, peak_less = measure()
    away = 12 - LEAVING
    assert held - held_less >= 0.95 * away * block_input
    assert peak - peak_less >= 0.95 * (away - 2) * block_input


@pytest.mark.gpu
def test_cuda_attention_policy_runs_no_kernel_again(small_mmdit, small_inputs):
    from torch.profiler import ProfilerActivity, profile

    model = cuda_model(small_mmdit, depth=1, depth_single_blocks=2)
    inputs = cuda_inputs(small_inputs, model, text=64)
    counts = []
    for policy in ("blocks", "attention"):
        checkpoint_blocks(model, None, policy)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            parameter_gradients(model, inputs)
        kernels = ("flash", "efficient", "cudnn")
        names = {f"aten::_scaled_dot_product_{kernel}_attention" for kernel in kernels}
        counts.append(sum(event.count for event in profiler.key_averages() if event.key in names))
    assert counts == [6, 3]
