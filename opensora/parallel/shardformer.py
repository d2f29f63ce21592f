"""ColossalAI's Shardformer for the T5 text encoder: its fused operations, each rank with the whole encoder."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from opensora.parallel.host import import_colossalai

if TYPE_CHECKING:
    from opensora.models.text import TextEmbedder


def apply_shardformer(embedder: TextEmbedder) -> TextEmbedder:
    """Put Shardformer's layers into the T5 of an embedder whose `shardformer` setting asks for it; the embeddings stay
    the same. Tensor parallelism is off, so this needs no process group and no particular device."""
    if not embedder.shardformer:
        return embedder
    import_colossalai()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of apex, which it would use
        from colossalai.shardformer import ShardConfig, ShardFormer

        config = ShardConfig(enable_tensor_parallelism=False, enable_jit_fused=True)
        embedder.encoder, _ = ShardFormer(config).optimize(embedder.encoder, policy=_t5_policy())
    return embedder


def _t5_policy():
    """ColossalAI 0.5.0's policy for T5 encoders, with a self-attention that transformers 5 can call too: its own one
    knows the arguments of transformers 4 only (`past_key_value`, `layer_head_mask`)."""
    from colossalai.shardformer.policies.t5 import T5EncoderPolicy
    from transformers.models.t5.modeling_t5 import T5LayerSelfAttention

    class T5Policy(T5EncoderPolicy):
        def module_policy(self):
            policy = super().module_policy()
            policy[T5LayerSelfAttention].method_replacement["forward"] = _self_attention
            return policy

    return T5Policy()


def _self_attention(layer: nn.Module, hidden_states: torch.Tensor, attention_mask=None, **arguments):
    """A T5LayerSelfAttention with the `dropout_add` that the policy gave it: whatever else transformers passes to the
    layer, and gets from it, goes through."""
    normed = layer.layer_norm(hidden_states)
    attended, *others = layer.SelfAttention(normed, mask=attention_mask, **arguments)
    added = layer.dropout_add(attended, hidden_states, layer.dropout.p, layer.dropout.training)
    return (added, *others)
