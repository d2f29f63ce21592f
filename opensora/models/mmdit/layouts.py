"""The layouts that weights of this architecture are published in: what their tensors are called, how they are cut.

All of them hold the same rows. What one layout keeps in a tensor of its own another joins to a larger one, so each is
described by its tensors and the parts these join. A part has the name of Open-Sora's parameter; where that is a
joined one itself, the name in `NAMINGS`.

open-sora  Open_Sora_v2, flux1-dev-fused-rope: q, k, v apart, rotate-half rotary
flux       flux1-dev, of black-forest-labs: q, k, v in one linear, interleaved rotary
diffusers  FluxTransformer2DModel: q, k, v and the single blocks' MLP apart, interleaved rotary, names of its own
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Layout(NamedTuple):
    """How a state dict holds the weights."""

    naming: str  # a key of NAMINGS
    interleaved: bool  # rotary planes (2d, 2d+1), else (d, D/2+d): the order of the rows of q and k in a head


OPEN_SORA = Layout("open-sora", interleaved=False)
FLUX = Layout("flux", interleaved=True)
DIFFUSERS = Layout("diffusers", interleaved=True)

# By the name that a converted file is marked with. The last two are what a model with half of flux's settings saves.
LAYOUTS = {
    "open-sora": OPEN_SORA,
    "flux": FLUX,
    "diffusers": DIFFUSERS,
    "open-sora-interleaved": Layout("open-sora", interleaved=True),
    "flux-rotate-half": Layout("flux", interleaved=False),
}

_SHIFT, _SCALE = "final_layer.adaLN_modulation.1.shift", "final_layer.adaLN_modulation.1.scale"
_IMAGE, _TEXT, _SINGLE = "double_blocks.{}.img", "double_blocks.{}.txt", "single_blocks.{}"
_TO = "transformer_blocks.{}"


def _qkv(attention: str) -> tuple[str, str, str]:
    return (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")


def _tensors(linears: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Linears -> their weights and biases."""
    joined = {name: (parts,) if isinstance(parts, str) else parts for name, parts in linears.items()}
    return {
        f"{name}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for name, parts in joined.items()
        for kind in ("weight", "bias")
    }


_OPEN_SORA = {
    f"{_SINGLE}.v_mlp": (f"{_SINGLE}.v_proj", f"{_SINGLE}.mlp_proj"),
    "final_layer.adaLN_modulation.1": (_SHIFT, _SCALE),
}

_FLUX = {
    f"{_IMAGE}_attn.qkv": _qkv(f"{_IMAGE}_attn"),
    f"{_TEXT}_attn.qkv": _qkv(f"{_TEXT}_attn"),
    f"{_SINGLE}.linear1": (*_qkv(_SINGLE), f"{_SINGLE}.mlp_proj"),
    "final_layer.adaLN_modulation.1": (_SHIFT, _SCALE),
}

_DIFFUSERS = {
    "x_embedder": "img_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    f"{_TO}.norm1.linear": f"{_IMAGE}_mod.lin",
    f"{_TO}.attn.to_q": f"{_IMAGE}_attn.q_proj",
    f"{_TO}.attn.to_k": f"{_IMAGE}_attn.k_proj",
    f"{_TO}.attn.to_v": f"{_IMAGE}_attn.v_proj",
    f"{_TO}.attn.to_out.0": f"{_IMAGE}_attn.proj",
    f"{_TO}.ff.net.0.proj": f"{_IMAGE}_mlp.0",
    f"{_TO}.ff.net.2": f"{_IMAGE}_mlp.2",
    f"{_TO}.norm1_context.linear": f"{_TEXT}_mod.lin",
    f"{_TO}.attn.add_q_proj": f"{_TEXT}_attn.q_proj",
    f"{_TO}.attn.add_k_proj": f"{_TEXT}_attn.k_proj",
    f"{_TO}.attn.add_v_proj": f"{_TEXT}_attn.v_proj",
    f"{_TO}.attn.to_add_out": f"{_TEXT}_attn.proj",
    f"{_TO}.ff_context.net.0.proj": f"{_TEXT}_mlp.0",
    f"{_TO}.ff_context.net.2": f"{_TEXT}_mlp.2",
    f"single_{_TO}.norm.linear": f"{_SINGLE}.modulation.lin",
    f"single_{_TO}.attn.to_q": f"{_SINGLE}.q_proj",
    f"single_{_TO}.attn.to_k": f"{_SINGLE}.k_proj",
    f"single_{_TO}.attn.to_v": f"{_SINGLE}.v_proj",
    f"single_{_TO}.proj_mlp": f"{_SINGLE}.mlp_proj",
    f"single_{_TO}.proj_out": f"{_SINGLE}.linear2",
    "norm_out.linear": (_SCALE, _SHIFT),
    "proj_out": "final_layer.linear",
}

_DIFFUSERS_NORMS = {
    f"{_TO}.attn.norm_q.weight": (f"{_IMAGE}_attn.norm.query_norm.scale",),
    f"{_TO}.attn.norm_k.weight": (f"{_IMAGE}_attn.norm.key_norm.scale",),
    f"{_TO}.attn.norm_added_q.weight": (f"{_TEXT}_attn.norm.query_norm.scale",),
    f"{_TO}.attn.norm_added_k.weight": (f"{_TEXT}_attn.norm.key_norm.scale",),
    f"single_{_TO}.attn.norm_q.weight": (f"{_SINGLE}.norm.query_norm.scale",),
    f"single_{_TO}.attn.norm_k.weight": (f"{_SINGLE}.norm.key_norm.scale",),
}

# Tensor -> the parts that its rows are, in order. What is not listed is a part itself. {}: the number of a block.
NAMINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "open-sora": _tensors(_OPEN_SORA),
    "flux": _tensors(_FLUX),
    "diffusers": {**_tensors(_DIFFUSERS), **_DIFFUSERS_NORMS},
}

_JOINED_BY = {
    naming: {part: tensor for tensor, parts in tensors.items() for part in parts} for naming, tensors in NAMINGS.items()
}
_BLOCK = re.compile(r"(?<=blocks\.)\d+")


def parts_of(tensor: str, naming: str) -> tuple[str, ...]:
    """The parts that a tensor joins, in the order of its rows: one, if it is not joined."""
    template, number = _template(tensor)
    parts = NAMINGS[naming].get(template)
    return tuple(part.format(number) for part in parts) if parts else (tensor,)


def tensor_with(part: str, naming: str) -> str:
    """The tensor that a part is in."""
    template, number = _template(part)
    tensor = _JOINED_BY[naming].get(template)
    return tensor.format(number) if tensor else part


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these tensors, by the published files: None if there is no block to tell by."""
    for name in names:
        if name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
            return DIFFUSERS
        if "_attn.qkv." in name or ".linear1." in name:
            return FLUX
        if ".q_proj." in name:
            return OPEN_SORA
    return None


def describe(layout: Layout) -> str:
    """For the log."""
    held = {"open-sora": "split qkv", "flux": "fused qkv", "diffusers": "diffusers' names"}[layout.naming]
    return f"{held} with {'interleaved' if layout.interleaved else 'rotate-half'} rotary"


def _template(name: str) -> tuple[str, str]:
    """A name with {} for the number of its block, and the number."""
    match = _BLOCK.search(name)
    return (_BLOCK.sub("{}", name, count=1), match[0]) if match else (name, "")
