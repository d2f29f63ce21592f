"""Captions -> embeddings, by a frozen T5 or CLIP text encoder of the transformers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opensora.common import get_logger
from opensora.registry import TEXT_ENCODERS

POOLED = {
    "t5": False,
    "clip": True,
    "clip_text_model": True,
}  # by config.json's model_type: one vector per text or token


@TEXT_ENCODERS.register("text_embedder")
class TextEmbedder(nn.Module):
    """Embeddings of captions: one per token (T5: the last hidden states) or one per caption (CLIP: the pooled state).

    Args:
        from_pretrained: a folder in the layout of the Hugging Face hub, or a hub id ("google/t5-v1_1-xxl"). The
            `model_type` of its config.json says whether it is T5 or CLIP.
        max_length: every caption is padded or cut to this number of tokens. `tokens_cut` counts what was cut off, and
            the first time is reported.
        shardformer: spread the encoder over tensor-parallel ranks: not available in this version.

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
        if shardformer:
            raise ValueError("shardformer=True is not available in this version: set it to False")
        config = text_config(from_pretrained)
        self.pooled = POOLED[config.model_type]
        self.width = width_of(config)
        self.max_length = max_length
        self.tokens_cut = 0
        self.tokenizer = load_tokenizer(from_pretrained)
        self.encoder = load_encoder(from_pretrained, self.pooled)
        if self.pooled and max_length > self.encoder.config.max_position_embeddings:
            limit = self.encoder.config.max_position_embeddings
            raise ValueError(
                f"max_length={max_length} is beyond the {limit} positions of '{from_pretrained}': lower it"
            )
        self.to(device=device, dtype=dtype)

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
        if any(cut) and not self.tokens_cut:
            first = next(index for index, number in enumerate(cut) if number)
            get_logger().warning(
                "a caption has %d tokens, max_length=%d: the rest is cut off, here and in further captions: %.60s...",
                lengths[first], self.max_length, texts[first],
            )  # fmt: skip
        self.tokens_cut += sum(cut)


def text_width(from_pretrained: str) -> int:
    """The width of a text encoder's embeddings, from its config.json alone."""
    return width_of(text_config(from_pretrained))


def width_of(config: Any) -> int:
    if config.model_type == "t5":
        return config.d_model
    return getattr(config, "text_config", config).hidden_size


def text_config(from_pretrained: str) -> Any:
    """The transformers config of a folder or hub id; FileNotFoundError or ValueError if it is not a T5 or CLIP."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(from_pretrained)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"from_pretrained='{from_pretrained}' is neither a folder with the config.json of a text encoder nor a "
            "model that the Hugging Face hub gave: download it first (ckpts/README.md)"
        ) from error
    if config.model_type not in POOLED:
        raise ValueError(
            f"from_pretrained='{from_pretrained}' is a '{config.model_type}': give one of {', '.join(POOLED)}"
        )
    return config


def load_tokenizer(from_pretrained: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(from_pretrained)


def load_encoder(from_pretrained: str, pooled: bool) -> nn.Module:
    """The encoder in fp32; ValueError if a weight is missing (transformers would draw it at random)."""
    from transformers import CLIPTextModel, T5EncoderModel
    from transformers.utils import logging

    cls = CLIPTextModel if pooled else T5EncoderModel
    logging.disable_progress_bar()  # one for each rank, otherwise
    try:
        encoder, report = cls.from_pretrained(from_pretrained, output_loading_info=True)
    finally:
        logging.enable_progress_bar()
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"from_pretrained='{from_pretrained}' lacks {len(missing)} weights of {cls.__name__}, the first "
            f"'{missing[0]}': download it again (ckpts/README.md)"
        )
    return encoder.float().eval().requires_grad_(False)
