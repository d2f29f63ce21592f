import copy
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from opensora.models.activation import checkpoint_blocks
from opensora.models.compilation import compile_blocks, why_not_compile
from opensora.models.offload import offload_inputs
from opensora.models.requirements import missing_requirements
from opensora.parallel.offload import HostBuffer

ONE_KIND = {"depth": 0, "depth_single_blocks": 2}  # compiles in half of the time


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.square().mean().backward()
    return out.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(model, plain, inputs):
    (out, found), (expected_out, expected) = gradients(model, inputs), gradients(plain, inputs)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    assert list(found) == list(expected)
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, error)


# Batch size, (frames, rows, columns) and text tokens: buckets differ in all of them.
SHAPES = [
    *((2, (2, 2, 3), 5), (3, (2, 2, 5), 5), (1, (2, 2, 5), 5), (1, (1, 3, 4), 7), (4, (5, 2, 3), 7), (2, (1, 2, 2), 3)),
    *(
        (2, (8, 2, 4), 9),
        (5, (3, 1, 11), 5),
        (1, (5, 5, 8), 64),
        (2, (1, 1, 17), 17),
        (7, (1, 4, 4), 2),
        (1, (1, 1, 2), 2),
    ),
]


@pytest.mark.slow
def test_graphs_do_not_grow_with_shapes_or_depth(small_mmdit, small_inputs):
    """The backend does not change how many graphs there are: "eager" makes each of them in a second."""
    model = small_mmdit(depth=6, depth_single_blocks=6)
    plain = small_mmdit(depth=6, depth_single_blocks=6)
    compile_blocks(model, backend="eager")
    every = [small_inputs(model, batch, *grid, text) for batch, grid, text in SHAPES]
    for inputs in every:
        assert_same_gradients(model, plain, inputs)
    assert graphs() == 4  # batch 1 and more of both kinds
    with torch.inference_mode():
        for inputs in every[:4]:
            assert torch.equal(model(**inputs), plain(**inputs))
    assert graphs() == 8  # the same without gradients
    assert not counters["graph_break"]


@pytest.mark.slow  # most of it for headers that torch compiles once per machine
def test_default_backend_on_this_machine(small_mmdit, small_inputs):
    if lacking := why_not_compile(has_cuda=False):
        pytest.skip(f"torch.compile needs {lacking}")
    model, plain = small_mmdit(**ONE_KIND), small_mmdit(**ONE_KIND)
    compile_blocks(model)
    assert_same_gradients(model, plain, small_inputs(model))
    assert_same_gradients(model, plain, small_inputs(model, batch=3, columns=4))
    assert graphs() == 1


def kept_bytes(model, inputs):
    """What autograd keeps for the backward pass beside the weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).sum()
    return sum(kept.values())


def attention_kernels(run):
    with torch.profiler.profile() as profile:
        result = run()
    keys = [
        event for event in profile.key_averages() if event.key == "aten::_scaled_dot_product_flash_attention_for_cpu"
    ]
    return sum(event.count for event in keys), result


@pytest.mark.slow
@pytest.mark.parametrize("policy, recomputed", [("attention", 0), ("blocks", 2)])
def test_recomputation_within_the_graph(small_mmdit, small_inputs, policy, recomputed):
    model, plain = small_mmdit(**ONE_KIND), small_mmdit(**ONE_KIND)
    inputs = small_inputs(model, batch=4)
    without = kept_bytes(plain, inputs)
    checkpoint_blocks(model, None, policy)
    compile_blocks(model, backend="aot_eager")
    assert_same_gradients(model, plain, inputs)
    assert kept_bytes(model, inputs) < 0.5 * without
    forward, out = attention_kernels(lambda: model(**inputs).sum())
    backward, _ = attention_kernels(out.backward)
    assert (forward, backward) == (2, recomputed)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, buffer, backend",
    [
        ("full", 0, "aot_eager"),
        ("blocks", 2**20, "aot_eager"),
        ("attention", 0, "aot_eager"),
        ("attention", 2**20, "inductor"),
    ],
)
def test_with_recomputation_and_offloading(small_mmdit, small_inputs, policy, buffer, backend):
    model, plain = small_mmdit(), small_mmdit()
    recomputed = checkpoint_blocks(model, (1, 2), policy)
    compile_blocks(model, backend=backend)
    memory = HostBuffer(buffer, torch.device("cpu"))
    if buffer:
        offload_inputs(recomputed, memory)
    for shape in ((2, 2, 2, 3, 5), (1, 2, 2, 3, 5), (3, 1, 5, 4, 5), (1, 1, 2, 3, 4)):
        inputs = small_inputs(model, *shape)
        assert_same_gradients(model, plain, inputs)
        out = model(**inputs)
        assert (memory.used > 0) == (buffer > 0)
        out.sum().backward()
        assert memory.used == 0
    assert graphs() <= 8  # recomputed and other blocks are two kinds


@pytest.mark.slow
def test_low_rank_adapters(small_mmdit, small_inputs):
    """Put on after compile_blocks, as the engine does: a block is compiled with what it holds when it is called."""
    peft = pytest.importorskip("peft")
    model, plain = small_mmdit(), small_mmdit()
    compile_blocks(model, backend="aot_eager")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_mlp", "linear2"], init_lora_weights=False)
    adapted = []
    for each in (model, plain):
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(each, config))
    inputs = small_inputs(model)
    found, expected = ([], [])
    for each, kept in zip(adapted, (found, expected), strict=True):
        each(**inputs).square().mean().backward()
        kept += [(name, p.grad) for name, p in each.named_parameters() if p.requires_grad]
    assert len(found) == len(expected) > 0
    for (name, gradient), (other, correct) in zip(found, expected, strict=True):
        assert name == other and (gradient - correct).norm() < 1e-5 * correct.norm()
    assert graphs() <= 4


def test_names_stay_and_copies_are_their_own(small_mmdit, small_inputs):
    model, names = small_mmdit(**ONE_KIND), list(small_mmdit(**ONE_KIND).state_dict())
    compile_blocks(model, backend="eager")
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == list(twin.state_dict()) == [n for n, _ in model.named_parameters()] == names
    inputs = small_inputs(model)
    with torch.no_grad():
        before = model(**inputs)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert torch.equal(model(**inputs), before)
        assert not torch.equal(twin(**inputs), before)
        assert graphs() == 1  # of both


def test_what_is_missing_is_said_before_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' on the PATH: apt-get install g++, or set CXX" in why_not_compile(has_cuda=False)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "a compiler" in why_not_compile(has_cuda=False)
    (tmp_path / ("clang++" if sys.platform == "darwin" else "g++")).touch(mode=0o755)
    assert "a compiler" not in (why_not_compile(has_cuda=False) or "")


def test_settings_that_need_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX" if not torch.cuda.is_available() else "CC", "no-such-compiler")
    settings = {"axes_dim": [4, 6, 6], "attention": "sdpa", "compile": True}
    (reason,) = missing_requirements(settings, torch.float32)
    assert reason.startswith("model.compile=True needs ") and reason.endswith("or set --model.compile False")
    assert missing_requirements({**settings, "compile": False}, torch.float32) == []


def test_triton_is_needed_on_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("a build of torch for CUDA brings triton")
    assert why_not_compile(has_cuda=True) == "the package triton for CUDA devices: pip install triton"
