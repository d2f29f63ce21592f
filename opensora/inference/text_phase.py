"""The texts of a whole list, encoded once and first: the encoders are gone before the transformer is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from opensora.models.frozen import build_frozen
from opensora.parallel.shardformer import apply_shardformer
from opensora.registry import TEXT_ENCODERS
from opensora.settings import check_text_width

TEXTS_AT_ONCE = 8


class EmbeddedTexts:
    """What a text encoder makes of texts, kept on the host: called like the encoder, with any of those texts.

    A T5-XXL embedding of 512 tokens takes 4 MiB in bf16.
    """

    def __init__(self, encoder: Callable[[list[str]], Tensor], texts: Iterable[str], batch_size: int = TEXTS_AT_ONCE):
        distinct = list(dict.fromkeys(texts))
        self._embedding: dict[str, Tensor] = {}
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            # a copy of each row: a slice would keep its whole batch
            self._embedding |= zip(batch, (row.clone() for row in encoder(batch).cpu()), strict=True)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, ...] on the host."""
        return torch.stack([self._embedding[text] for text in texts])


def embed_texts(
    cfg, texts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> tuple[EmbeddedTexts, EmbeddedTexts]:
    """The embeddings of `texts` by the config's t5 and clip, which are loaded one after the other and freed."""
    found = []
    for section in ("t5", "clip"):
        encoder = build_text_encoder(cfg, section, dtype, device)
        found.append(EmbeddedTexts(encoder, texts))
        del encoder
        release_memory()
    return found[0], found[1]


def release_memory() -> None:
    """Give back what models held that nothing refers to any more; one whose forward was replaced refers to itself."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a CUDA device


def build_text_encoder(cfg, section: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The encoder of the config's section "t5" or "clip".

    Raises:
        ValueError: the model takes embeddings of another width (of a hub name that is known only now).
    """
    encoder = apply_shardformer(build_frozen(TEXT_ENCODERS, cfg[section], section, dtype, device))
    check_text_width(cfg, section, encoder.width)
    return encoder
