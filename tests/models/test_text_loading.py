"""Folders as the hub has them: T5 and CLIP whole, in every file format, with their original tokenizers, and broken."""

import io
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from opensora.models.text import TextEmbedder
from opensora.models.text.loading import load_encoder

PROMPTS = ["a red circle moving left. 12 FPS.", "", "A purple hexagon, 23.976 FPS, 4 motion score."]
EXTRA_IDS = [f"<extra_id_{index}>" for index in range(100)]
T5_CONFIG = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06, "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": False, "vocab_size": 256,
}  # fmt: skip  # the fields of google/t5-v1_1-xxl's


def write_spiece(folder: Path):
    """The tokenizer files of google/t5-v1_1-xxl, with a small vocabulary; returns sentencepiece's own reader."""
    import sentencepiece

    lines = [*PROMPTS, "the quick brown fox jumps over the lazy dog"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=80, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
    )  # fmt: skip
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": EXTRA_IDS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "extra_ids": 100}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def whole_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**T5_CONFIG)).eval()


@pytest.fixture
def t5_folder(tmp_path) -> Path:
    """google/t5-v1_1-xxl in small: encoder and decoder in one pytorch_model.bin, spiece.model."""
    folder = tmp_path / "t5"
    write_spiece(folder)
    (folder / "config.json").write_text(json.dumps(T5_CONFIG))
    torch.save(whole_t5().state_dict(), folder / "pytorch_model.bin")
    return folder


# ------------------------------------------------------------------------------------------------------ formulas


def bucket(distance: int, buckets: int = 32, farthest: int = 128) -> int:
    """T5's bucket of a relative position: half for each side, of those half exact, then logarithmic."""
    half = buckets // 2
    side, distance = (half if distance > 0 else 0), abs(distance)
    exact = half // 2
    if distance < exact:
        return side + distance
    return side + min(half - 1, exact + int(math.log(distance / exact) / math.log(farthest / exact) * (half - exact)))


def naive_t5(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """The last hidden states [S, D] of a T5 v1.1 encoder, from its description (arXiv 1910.10683, 2002.05202)."""
    heads, size = T5_CONFIG["num_heads"], len(ids)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[name + ".weight"]

    buckets = torch.tensor([[bucket(key - query) for key in range(size)] for query in range(size)])
    bias = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][buckets].permute(2, 0, 1)
    x = weights["shared.weight"][torch.tensor(ids)]
    for layer in range(T5_CONFIG["num_layers"]):
        block = f"encoder.block.{layer}.layer."
        normed = norm(x, block + "0.layer_norm")
        q, k, v = (
            (normed @ weights[f"{block}0.SelfAttention.{n}.weight"].T).view(size, heads, -1).transpose(0, 1)
            for n in "qkv"
        )
        mixed = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v  # no 1 / sqrt(d), no mask
        x = x + mixed.transpose(0, 1).reshape(size, -1) @ weights[f"{block}0.SelfAttention.o.weight"].T
        normed, dense = norm(x, block + "1.layer_norm"), block + "1.DenseReluDense."
        gate = functional.gelu(normed @ weights[dense + "wi_0.weight"].T, approximate="tanh")
        x = x + gate * (normed @ weights[dense + "wi_1.weight"].T) @ weights[dense + "wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


def test_t5_is_what_its_paper_says_over_padding_too(t5_folder):
    embedder = TextEmbedder(str(t5_folder), 150)  # beyond the farthest bucket
    weights = {name: tensor.detach() for name, tensor in whole_t5().state_dict().items()}
    embeddings = embedder(PROMPTS)
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        ids = embedder.tokenize([prompt])[0].tolist()
        assert ids[-1] == 0
        torch.testing.assert_close(embedding, naive_t5(weights, ids), atol=2e-5, rtol=2e-5)


# --------------------------------------------------------------------------------------------------- file formats


def save_bin(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def save_bin_shards(folder, weights):
    names, files = list(weights), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for part, file in enumerate(files):
        torch.save({name: weights[name] for name in names[part::2]}, folder / file)
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_safetensors(folder, weights):
    untied = {name: tensor.clone() for name, tensor in weights.items()}
    save_file(untied, folder / "model.safetensors", metadata={"format": "pt"})


def save_safetensors_shards(folder, weights):
    whole_t5().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_only_shared(folder, weights):
    save_safetensors(folder, {n: t for n, t in weights.items() if "embed_tokens" not in n})


def save_only_embed_tokens(folder, weights):
    save_safetensors(folder, {n: t for n, t in weights.items() if n != "shared.weight"})


FORMATS = [
    save_bin, save_bin_shards, save_safetensors, save_safetensors_shards, save_only_shared, save_only_embed_tokens,
]  # fmt: skip


@pytest.mark.parametrize("save", FORMATS, ids=lambda save: save.__name__)
def test_the_encoder_of_a_whole_t5_in_any_format(t5_folder, save, capfd):
    model = whole_t5()
    (t5_folder / "pytorch_model.bin").unlink()
    save(t5_folder, model.state_dict())
    capfd.readouterr()
    embedder = TextEmbedder(str(t5_folder), 64)
    assert capfd.readouterr() == ("", "")  # the decoder is left out without a word
    assert embedder.encoder.shared.weight is embedder.encoder.encoder.embed_tokens.weight
    expected = model.encoder(embedder.tokenize(PROMPTS)).last_hidden_state.detach()
    torch.testing.assert_close(embedder(PROMPTS), expected, atol=1e-5, rtol=1e-5)


def anonymous_bytes() -> int:
    """What this process has allocated; mapped files do not count."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def peak_of(work) -> int:
    """The most bytes allocated during `work()`, more than before it."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        kept = work()
    finally:
        done.set()
        thread.join()
    assert kept is not None
    return max(peak, anonymous_bytes()) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
@pytest.mark.parametrize(
    ("file_dtype", "dtype", "save"),
    [
        (torch.float32, torch.bfloat16, save_bin),
        (torch.float32, torch.bfloat16, save_safetensors),
        (torch.bfloat16, torch.float32, save_safetensors),
        (torch.bfloat16, torch.bfloat16, save_safetensors),
    ],
)
def test_loading_allocates_the_encoder_in_its_dtype_and_no_more(tmp_path, file_dtype, dtype, save):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**{**T5_CONFIG, "d_model": 256, "d_ff": 2**14, "num_layers": 4, "num_decoder_layers": 3})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    save(tmp_path, {name: torch.zeros(t.shape, dtype=file_dtype) for name, t in model.state_dict().items()})
    encoder_bytes = sum(p.numel() for p in model.encoder.parameters()) * dtype.itemsize
    assert encoder_bytes > 90e6
    allowed = 0 if file_dtype == dtype else encoder_bytes  # the file itself is mapped
    assert peak_of(lambda: load_encoder(str(tmp_path), False, dtype, "cpu")) < 1.1 * allowed + 15e6


# ----------------------------------------------------------------------------------------------------- tokenizers


def test_spiece_model_alone_gives_sentencepieces_own_ids(tmp_path, t5_folder):
    sentencepiece = write_spiece(t5_folder)
    embedder = TextEmbedder(str(t5_folder), 64)
    alphabet, draw = (
        "abcdefgh ijklmnop qrstuvwxyz.,!?0123456789\n\tÄéß“”—…①ﬁ１ｘ中かか한\u00a0\u200b😀",
        random.Random(0),
    )
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(300)]
    texts += [*PROMPTS, " two  spaces ", "cafe\u0301"]
    for text, ids in zip(texts, embedder.tokenize(texts).tolist(), strict=True):
        expected = [*sentencepiece.encode(text), 1]
        assert ids == expected + [0] * (64 - len(expected)), text
    assert embedder.tokens_cut == 0


def test_without_sentencepiece_its_name_is_said(t5_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"spiece.model needs sentencepiece: pip install sentencepiece") as raised:
        TextEmbedder(str(t5_folder), 16)
    assert "\n" not in str(raised.value)


def naive_clip_ids(text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """CLIP's byte pair encoding of an ASCII text, one merge rule after the other."""
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            merged: list[str] = []
            for piece in pieces:
                joins = piece == right and merged and merged[-1] == left
                merged[-1 if joins else len(merged) :] = [left + right if joins else piece]
            pieces = merged
        ids += [vocabulary[piece] for piece in pieces]
    return ids


@pytest.fixture
def clip_folder(tmp_path, monkeypatch) -> Path:
    """openai/clip-vit-large-patch14 in small: text and image encoder, vocab.json and merges.txt, eos_token_id 2."""
    from transformers import CLIPConfig, CLIPModel

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts/demo"))
    import text_encoders

    folder = tmp_path / "clip"
    size = text_encoders.write_clip_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": size, "max_position_embeddings": 77, "projection_dim": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # wrong, as in the published file
    vision = {**sizes, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder)
    return folder


def test_the_text_encoder_of_a_whole_clip_with_its_original_tokenizer(clip_folder, capfd):
    from transformers import CLIPModel

    vocabulary = json.loads((clip_folder / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (clip_folder / "merges.txt").read_text().splitlines()[1:]]
    model = CLIPModel.from_pretrained(clip_folder)
    capfd.readouterr()
    embedder = TextEmbedder(str(clip_folder), 77)
    assert capfd.readouterr() == ("", "")
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    for prompt in [*PROMPTS, "Unknown words!? it's 1984 zzz"]:
        ids = [start, *naive_clip_ids(prompt, vocabulary, merges), end]
        assert embedder.tokenize([prompt])[0].tolist() == ids + [end] * (77 - len(ids))
        states = model.text_model(torch.tensor([ids])).last_hidden_state.detach()  # not padded
        torch.testing.assert_close(embedder([prompt]), states[:, -1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- hub and mistakes


@pytest.mark.slow
def test_the_hubs_name_reads_the_hubs_cache(t5_folder, tmp_path):
    """The documented id, as it works offline after the first download."""
    repository, commit = tmp_path / "home/hub/models--google--t5-v1_1-xxl", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    t5_folder.rename(repository / "snapshots" / commit)
    program = """
from opensora.models.text import TextEmbedder, text_width
print(text_width("google/t5-v1_1-xxl"), list(TextEmbedder("google/t5-v1_1-xxl", 20)(["a red circle"]).shape))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "32 [1, 20, 32]\n"


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def git_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44541580809\n")


def misshapen(folder: Path) -> None:
    weights = whole_t5().state_dict()
    weights["encoder.block.1.layer.0.SelfAttention.q.weight"] = torch.zeros(7, 32)
    save_bin(folder, weights)


def without_shard(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    save_safetensors_shards(folder, {})
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def small_vocabulary(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**T5_CONFIG, "vocab_size": 50}))
    weights = whole_t5().state_dict()
    save_bin(folder, {n: t[:50].clone() if len(t) == 256 and "wi" not in n else t for n, t in weights.items()})


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "neither a folder with the config.json"),
    "no tokenizer": (lambda f: (f / "spiece.model").unlink(), "has no tokenizer that can be read .* or spiece.model"),
    "tokenizer cut": (lambda f: cut(f / "spiece.model", 500), "has no tokenizer that can be read"),
    "tokenizer not fetched": (lambda f: git_lfs(f / "spiece.model"), "has no tokenizer that can be read"),
    "tokenizer.json cut": (lambda f: (f / "tokenizer.json").write_text('{"ver'), "has no tokenizer that can be read"),
    "no weights": (lambda f: (f / "pytorch_model.bin").unlink(), "its weights can't be read"),
    "weights cut": (lambda f: cut(f / "pytorch_model.bin", -9000), "its weights can't be read"),
    "weights not fetched": (lambda f: git_lfs(f / "pytorch_model.bin"), "its weights can't be read"),
    "a shard missing": (without_shard, "its weights can't be read"),
    "misshapen": (misshapen, "1 weights have another shape than its config.json says, .*q.weight'"),
    "another model's tokenizer": (small_vocabulary, r"its tokenizer has \d+ tokens, its weights only 50"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(t5_folder, name, capfd):
    break_it, words = BROKEN[name]
    break_it(t5_folder)
    capfd.readouterr()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        TextEmbedder(str(t5_folder), 16)
    assert "\n" not in str(raised.value) and str(t5_folder) in str(raised.value)
    assert capfd.readouterr() == ("", "")
