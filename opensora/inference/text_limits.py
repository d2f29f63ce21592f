"""Prompts that are longer than the text encoders read, found before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from opensora.common import get_logger
from opensora.models.text.loading import POOLED, load_tokenizer, text_config


def report_long_texts(cfg, texts: Sequence[str]) -> None:
    """Say how many texts are longer than the `max_length` of t5, and of clip; needs their tokenizers alone.

    Only the first is a warning: detailed texts are too long for CLIP, and T5 reads on.
    """
    texts = list(dict.fromkeys(texts))
    for section, say, note in (
        ("t5", get_logger().warning, "the model never sees what is beyond"),
        ("clip", get_logger().info, "t5 reads further"),
    ):
        limit, path = cfg[section]["max_length"], cfg[section]["from_pretrained"]
        tokenizer = load_tokenizer(path, POOLED[text_config(path).model_type])
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        over = [length for length in lengths if length > limit]
        if over:
            say(
                f"{len(over)} of {len(texts)} texts have more than {section}.max_length={limit} tokens, the longest "
                f"{max(over)}: {note}"
            )
