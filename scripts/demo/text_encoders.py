"""Make the demo's two text encoders: folders in the layout of the Hugging Face hub, with tokenizers of their own.

They are T5 and CLIP as transformers defines them, a few thousand times smaller, with random weights of a fixed seed.
That is enough for the demo: what a frozen encoder must give is a distinct and stable embedding of each prompt, and
the diffusion model learns what the words mean.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from render import COLOURS, DIRECTIONS, SHAPES

from opensora.models.weight_files import save_shard

WIDTH = 64
LAYERS = 2
MAX_POSITIONS = 77
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def words() -> list[str]:
    """The words with a token of their own. Any other word is spelt, letter by letter."""
    prompts = ["a", "an", "the", "and", "moving", *COLOURS, *SHAPES, *DIRECTIONS]
    suffixes = ["FPS", "fps", "motion", "score", *(str(number) for number in range(31))]
    return [*prompts, *suffixes]


def make_t5(folder: Path, seed: int = 0) -> None:
    """Write a T5EncoderModel and its Unigram tokenizer to `folder`."""
    import torch
    from transformers import T5Config, T5EncoderModel

    size = write_t5_tokenizer(folder)
    config = T5Config(
        vocab_size=size,
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        num_heads=4,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        architectures=["T5EncoderModel"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    weights = T5EncoderModel(config).state_dict()
    del weights["encoder.embed_tokens.weight"]  # is shared.weight
    save_shard(folder / "model.safetensors", weights)


def write_t5_tokenizer(folder: Path) -> int:
    """A Unigram tokenizer as T5's: whole words first, characters for what is not a known word. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["▁" + word for word in words()] + [*string.punctuation]
    spelling = ["▁", *string.ascii_letters, *string.digits]
    scores = dict.fromkeys(T5_SPECIAL, 0.0) | dict.fromkeys(spelling, -10.0) | dict.fromkeys(pieces, -1.0)
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2, byte_fallback=False))
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(T5_SPECIAL))
    write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="T5TokenizerFast",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=512,
    )
    return tokenizer.get_vocab_size()


def make_clip(folder: Path, seed: int = 1) -> None:
    """Write a CLIPTextModel and its byte-level BPE tokenizer to `folder`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    size = write_clip_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        projection_dim=WIDTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        architectures=["CLIPTextModel"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    # The names of the published weights: transformers 5 would write them without the prefix, which 4.51 doesn't read.
    weights = {
        "text_model." + name.removeprefix("text_model."): t for name, t in CLIPTextModel(config).state_dict().items()
    }
    weights = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    save_shard(folder / "model.safetensors", weights)


def write_clip_tokenizer(folder: Path) -> int:
    """A lower-casing byte-level BPE tokenizer as CLIP's, with known words as one token each. Returns its size."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    start, end = CLIP_SPECIAL
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(word, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=1, vocab_size=10_000, show_progress=False
    )
    # Each byte alone is a word too, so that every text can be spelt.
    tokenizer.train_from_iterator([" ".join(words())], trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges), start, end]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer.model = models.BPE(
        vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=end
    )
    tokenizer.decoder = decoders.ByteLevel()
    ends = (end, vocabulary[end]), (start, vocabulary[start])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([start, end])
    write_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="CLIPTokenizerFast",
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=MAX_POSITIONS,
    )
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    return len(vocabulary)


def write_tokenizer(folder: Path, tokenizer, **config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
