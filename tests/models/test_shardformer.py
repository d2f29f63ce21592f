"""T5 through ColossalAI's ShardFormer against the same T5 without it."""

import copy
from types import SimpleNamespace

import pytest
import torch

from opensora.parallel.shardformer import apply_shardformer


def t5(dtype: torch.dtype, feed_forward: str):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=99, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=3, dropout_rate=0.1)
    config = T5Config(**{**config.to_dict(), "feed_forward_proj": feed_forward})
    torch.manual_seed(0)
    model = T5EncoderModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model.to(dtype)


def wrapped(encoder, shardformer: bool = True):
    return SimpleNamespace(encoder=encoder, shardformer=shardformer)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_embeddings_are_those_of_plain_t5(dtype, tolerance, feed_forward):
    plain = t5(dtype, feed_forward)
    fused = apply_shardformer(wrapped(copy.deepcopy(plain))).encoder
    for seed in range(4):  # a scripted function is specialised after its first calls
        tokens = torch.randint(99, (2, 17), generator=torch.Generator().manual_seed(seed))
        expected, found = plain(tokens).last_hidden_state, fused(tokens).last_hidden_state
        assert expected.std() > 0.1 and found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_it_is_shardformer_that_ran():
    fused = apply_shardformer(wrapped(t5(torch.float32, "gated-gelu"))).encoder
    calls = []
    for layer in (fused.encoder.block[0].layer[0], fused.encoder.block[2].layer[1]):
        assert layer.dropout_add.__func__.__module__ == "colossalai.shardformer.modeling.jit"
        original = layer.dropout_add
        layer.dropout_add = lambda *values, original=original: calls.append(1) or original(*values)
    fused(torch.ones(1, 5, dtype=torch.long))
    assert len(calls) == 2


def test_nothing_changes_without_the_setting():
    plain = t5(torch.float32, "relu")
    assert apply_shardformer(wrapped(plain, shardformer=False)).encoder is plain
    assert not hasattr(plain.encoder.block[0].layer[0], "dropout_add")
