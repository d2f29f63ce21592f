import math

import torch

from opensora.models.attention import attention


def naive_attention(q, k, v):
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    out = scores.softmax(-1) @ v.double()  # [B, H, L, D]
    return torch.cat(out.unbind(1), dim=-1)  # [B, L, H*D]


def test_equals_softmax_by_hand():
    q, k, v = torch.randn(3, 2, 4, 13, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = attention(q, k, v)
    assert out.shape == (2, 13, 24)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v), atol=1e-6, rtol=1e-5)


def test_keys_may_be_longer_than_queries_and_heads_strided():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 5, 2, 8, generator=generator).transpose(1, 2)
    k, v = (torch.randn(1, 9, 2, 8, generator=generator).transpose(1, 2) for _ in range(2))
    torch.testing.assert_close(attention(q, k, v).double(), naive_attention(q, k, v), atol=1e-6, rtol=1e-5)
