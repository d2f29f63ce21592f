"""Captions -> embeddings, by a frozen T5 or CLIP text encoder of the transformers library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.common import get_logger
from opensora.models.text.loading import POOLED, load_encoder, load_tokenizer, positions_of, text_config, width_of
from opensora.registry import TEXT_ENCODERS


@TEXT_ENCODERS.register("text_embedder")
class TextEmbedder(nn.Module):
    """Embeddings of captions: one per token (T5: the last hidden states) or one per caption (CLIP: the pooled state).

    Args:
        from_pretrained: a folder in the layout of the Hugging Face hub, or a hub id ("google/t5-v1_1-xxl"). The
            `model_type` of its config.json says whether it is T5 or CLIP.
        max_length: every caption is padded or cut to this number of tokens. The first cut is reported, and all are
            counted in `texts_seen`, `texts_cut` and `tokens_cut`.
        shardformer: run T5 with the fused operations of ColossalAI's Shardformer: the same embeddings. Who builds the
            embedder applies it (`parallel.shardformer`): here it is a setting only.
        dtype: of the weights and the embeddings. Loaded in it straight away; for bf16 and fp32 that equals casting
            the fp32 weights.

    No attention mask is used, as in the training of the published weights: T5 attends to its padding. (CLIP is causal:
    what follows the end of the text does not reach the pooled state.)
    """

    def __init__(
        self,
        from_pretrained: str,
        max_length: int,
        shardformer: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        config = text_config(from_pretrained)
        self.pooled = POOLED[config.model_type]
        self.width = width_of(config)
        self.max_length = max_length
        self.shardformer = shardformer
        self.texts_seen = self.texts_cut = self.tokens_cut = 0
        if shardformer and self.pooled:
            raise ValueError(
                f"shardformer=True is for T5, and '{from_pretrained}' is a '{config.model_type}': set it to False"
            )
        if self.pooled and max_length > (positions := positions_of(config)):
            raise ValueError(
                f"max_length={max_length} is beyond the {positions} positions of '{from_pretrained}': lower it"
            )
        self.tokenizer = load_tokenizer(from_pretrained, self.pooled)
        self.encoder = load_encoder(from_pretrained, self.pooled, dtype, device)
        if len(self.tokenizer) > self.encoder.config.vocab_size:
            raise ValueError(
                f"from_pretrained='{from_pretrained}': its tokenizer has {len(self.tokenizer)} tokens, its weights "
                f"only {self.encoder.config.vocab_size}: they are not of one model"
            )

    @torch.no_grad()
    def forward(self, texts: list[str]) -> Tensor:
        """T5: [B, max_length, width]; CLIP: [B, width]; in the dtype and on the device of the weights."""
        tokens = self.tokenize(texts).to(self.encoder.device)  # [B, max_length]
        output = self.encoder(input_ids=tokens)
        return output.pooler_output if self.pooled else output.last_hidden_state

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids [B, max_length], int64, on the CPU."""
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]
        self._count_cut(texts, lengths)
        fixed = {"max_length": self.max_length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, **fixed).input_ids

    def _count_cut(self, texts: list[str], lengths: list[int]) -> None:
        cut = [max(0, length - self.max_length) for length in lengths]
        if any(cut) and not self.texts_cut:
            first = next(index for index, number in enumerate(cut) if number)
            get_logger().warning(
                "%s: a text has %d tokens, max_length=%d: the rest is cut off, here and in further texts: %.60s...",
                "CLIP" if self.pooled else "T5", lengths[first], self.max_length, texts[first],
            )  # fmt: skip
        self.texts_seen += len(texts)
        self.texts_cut += sum(number > 0 for number in cut)
        self.tokens_cut += sum(cut)


def cut_summary(where: str, max_length: int, seen: int, cut: int, tokens: int) -> str:
    """What a user is told at the end: of `seen` texts, `cut` were too long, by `tokens` tokens together."""
    return f"{where}: {cut} of {seen} texts had more than max_length={max_length} tokens: {tokens} tokens were cut off"
