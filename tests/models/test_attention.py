import importlib.util
import math
import typing

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora.models.activation import checkpoint_blocks
from opensora.models.attention import FLASH, attention, flash_attention, select_attention, why_not_attention
from opensora.models.compilation import compile_blocks
from opensora.settings import ModelBuilding


def naive_attention(q, k, v):
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    out = scores.softmax(-1) @ v.double()  # [B, H, L, D]
    return torch.cat(out.unbind(1), dim=-1)  # [B, L, H*D]


def heads(*lengths, batch=2, count=3, dim=8, dtype=torch.float32, device="cpu", seed=0):
    """Tensors [B, H, L, D] as the blocks pass them: views of [B, L, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        x = torch.randn(batch, length, count, dim, generator=generator).to(device, dtype)
        yield x.requires_grad_().transpose(1, 2)


def check_gradients(attend, q, k, v, **tolerance):
    """Output and gradients of `attend` equal those of the formula."""
    out = attend(q, k, v)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.device)
    expected = naive_attention(q, k, v)
    torch.testing.assert_close(out.double(), expected, **tolerance)
    found = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
    for gradient, correct in zip(found, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient.double(), correct.double(), **tolerance)


TIGHT, LOOSE = {"atol": 1e-5, "rtol": 1e-5}, {"atol": 3e-2, "rtol": 3e-2}


# ------------------------------------------------------------------------------------------------------------ sdpa


def test_equals_softmax_by_hand():
    q, k, v = torch.randn(3, 2, 4, 13, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = attention(q, k, v)
    assert out.shape == (2, 13, 24)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TIGHT), (torch.bfloat16, LOOSE)])
@pytest.mark.parametrize("lengths", [(13, 13, 13), (5, 9, 9), (33, 1, 1)])
def test_all_kernels_of_the_cpu(backend, dtype, tolerance, lengths):
    with sdpa_kernel(backend):
        check_gradients(attention, *heads(*lengths, dtype=dtype), **tolerance)


def test_nothing_is_copied():
    q, k, v = (x.detach() for x in heads(64, 64, 64))
    with torch.profiler.profile() as profile:
        attention(q, k, v)
    names = {event.key for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" in names
    assert not names & {"aten::clone", "aten::copy_", "aten::contiguous"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
)
def test_all_kernels_of_a_gpu(backend):
    with sdpa_kernel(backend):
        check_gradients(
            attention, *heads(77, 130, 130, dim=64, dtype=torch.bfloat16, device="cuda"), atol=3e-2, rtol=3e-2
        )


# ----------------------------------------------------------------------------------------------------------- flash

# A stand-in for flash-attention, which needs CUDA: its functions, layout and ways to return, by plain mathematics.
# It tests our adapter; the package itself is tested below, where it is installed.
STAND_IN = """
import torch

def flash_attn_func(q, k, v):
    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v))
    calls.append(tuple(x.data_ptr() for x in (q, k, v)))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
    return {returns}

calls = []
"""


# One whose kernel is an operator, as those of today's releases are, with the name of flash-attention 3's.
STAND_IN_OPERATOR = """
import torch
from torch import Tensor

@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    calls.append(q.shape)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).contiguous(), scores.softmax(-1)

@forward.register_fake
def _(q, k, v):
    return torch.empty(q.shape), torch.empty(q.shape[0], q.shape[2], q.shape[1], k.shape[1])

def backward(ctx, grad, _):
    q, k, v, p = ctx.saved_tensors
    dp = torch.einsum("blhd,bmhd->bhlm", grad, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dq, dk = torch.einsum("bhlm,bmhd->blhd", ds, k), torch.einsum("bhlm,blhd->bmhd", ds, q)
    return dq, dk, torch.einsum("bhlm,blhd->bmhd", p, grad)

forward.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]))

def flash_attn_func(q, k, v):
    return forward(q, k, v)[0]

calls = []
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """install(module, returns) -> the module, importable; returns: "out" or what the function returns else."""

    def install(module, returns="out.contiguous()", text=STAND_IN):
        (tmp_path / f"{module}.py").write_text(text.replace("{returns}", returns))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(importlib.sys.modules, module, raising=False)
        return importlib.import_module(module)

    yield install
    for package in FLASH.values():
        importlib.sys.modules.pop(package.module, None)


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("returns", ["out.contiguous()", "(out.contiguous(), scores.logsumexp(-1))"])
def test_adapter_with_a_stand_in(stand_in, name, returns):
    module = stand_in(FLASH[name].module, returns)
    q, k, v = heads(12, 7, 7)
    check_gradients(flash_attention(name), q, k, v, **TIGHT)
    assert module.calls == [(q.data_ptr(), k.data_ptr(), v.data_ptr())]  # the same memory: nothing was copied


@pytest.mark.parametrize("name", FLASH)
def test_every_block_of_a_model_gets_it(stand_in, small_mmdit, small_inputs, name):
    module = stand_in(FLASH[name].module)
    model = small_mmdit()
    inputs = small_inputs(model)
    expected = model(**inputs)
    select_attention(model, name)
    torch.testing.assert_close(model(**inputs), expected, atol=1e-5, rtol=1e-5)
    assert len(module.calls) == len(model.double_blocks) + len(model.single_blocks)
    select_attention(model, "sdpa")
    assert torch.equal(model(**inputs), expected)


def test_a_release_that_torch_cannot_trace_leaves_a_gap(stand_in):
    torch._dynamo.reset()
    stand_in("flash_attn")
    compiled = torch.compile(flash_attention("flash_attn_2"), dynamic=True, backend="eager")
    check_gradients(compiled, *heads(12, 7, 7), **TIGHT)


@pytest.mark.parametrize("wrap", ["eager", "compiled"])
def test_operators_are_traced_and_kept_by_selective_recomputation(stand_in, small_mmdit, small_inputs, wrap):
    torch._dynamo.reset()
    module = stand_in("flash_attn_interface", text=STAND_IN_OPERATOR)
    model, plain = (small_mmdit(depth=0, depth_single_blocks=2) for _ in range(2))
    select_attention(model, "flash_attn_3")
    checkpoint_blocks(model, None, "attention")
    if wrap == "compiled":
        compile_blocks(model, backend="aot_eager")
    inputs = small_inputs(model)
    model(**inputs).square().sum().backward()
    assert len(module.calls) == 2  # none in the backward pass
    plain(**inputs).square().sum().backward()
    for parameter, correct in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, correct.grad, atol=1e-4, rtol=1e-4)


def test_a_build_for_another_torch_is_one_line(tmp_path, monkeypatch):
    text = "raise ImportError('libflash.so: undefined symbol: _ZN3c10\\nand more')"
    (tmp_path / "flash_attn.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"model.attention='flash_attn_2': .*undefined symbol: _ZN3c10\): .*sdpa$"):
        flash_attention("flash_attn_2")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"has_cuda": False}, "needs a CUDA device"),
        ({}, "needs the module flash_attn: pip install flash-attn"),
        ({"installed": True, "dtype": torch.float32}, "computes in bf16 or fp16, not in float32: set --dtype bf16"),
        ({"installed": True, "head_dim": 36}, "axes_dim adds up to 36"),
        ({"installed": True, "head_dim": 264}, "axes_dim adds up to 264"),
        ({"installed": True}, None),
        ({"name": "sdpa", "has_cuda": False}, None),
    ],
)
def test_what_is_missing_is_said_before_a_run(tmp_path, monkeypatch, change, says):
    facts = {"name": "flash_attn_2", "head_dim": 128, "dtype": torch.bfloat16, "has_cuda": True, **change}
    if facts.pop("installed", False):
        (tmp_path / "flash_attn.py").write_text("raise AssertionError('looked up, not imported')")
        monkeypatch.syspath_prepend(tmp_path)
    elif facts["has_cuda"] and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    found = why_not_attention(**facts, where="img_flux")
    assert (found is None) == (says is None)
    assert says is None or (says in found and found.startswith("img_flux.attention='flash_attn_2'"))


def test_names_are_those_of_the_setting():
    names = typing.get_args(typing.get_type_hints(ModelBuilding)["attention"])
    assert names == ("sdpa", *FLASH)
    with pytest.raises(ValueError, match=r"model.attention='flash_attn_4' is unknown \(did you mean 'flash_attn_"):
        flash_attention("flash_attn_4")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_package_itself(name, dtype):
    if importlib.util.find_spec(FLASH[name].module) is None:
        pytest.skip(f"{FLASH[name].module} is not installed")
    q, k, v = heads(77, 130, 130, dim=128, dtype=dtype, device="cuda")
    check_gradients(flash_attention(name), q, k, v, **LOOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
def test_the_package_itself_is_traced(name):
    if importlib.util.find_spec(FLASH[name].module) is None:
        pytest.skip(f"{FLASH[name].module} is not installed")
    attend = flash_attention(name)
    q, k, v = heads(77, 130, 130, dim=128, dtype=torch.bfloat16, device="cuda")
    check_gradients(torch.compile(attend, dynamic=True), q, k, v, **LOOSE)
