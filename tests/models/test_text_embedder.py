"""TextEmbedder on tiny encoders in the hub's layout, against transformers called by hand."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.models.text import TextEmbedder, text_width
from opensora.registry import TEXT_ENCODERS

PROMPTS = ["a red circle moving left. 12 FPS.", "", "A purple hexagon, 23.976 FPS, 4 motion score."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts/demo"))
        import text_encoders

        text_encoders.make_t5(root / "t5")
        text_encoders.make_clip(root / "clip")
    return {"t5": str(root / "t5"), "clip": str(root / "clip")}


def build(folder: str | Path, max_length: int, dtype=torch.float32, **settings) -> TextEmbedder:
    settings = {"type": "text_embedder", "from_pretrained": str(folder), "max_length": max_length, **settings}
    return TEXT_ENCODERS.build(settings, where="t5", dtype=dtype, device="cpu")


def test_t5_is_the_last_hidden_state_without_a_mask(folders):
    from transformers import AutoTokenizer, T5EncoderModel

    embedder = build(folders["t5"], 40)
    tokenizer, model = AutoTokenizer.from_pretrained(folders["t5"]), T5EncoderModel.from_pretrained(folders["t5"])
    embeddings = embedder(PROMPTS)
    assert embeddings.shape == (3, 40, 64) and not embeddings.requires_grad
    assert embedder.width == 64 and not embedder.pooled
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        ids = tokenizer(prompt).input_ids
        ids = torch.tensor([ids + [0] * (40 - len(ids))])
        torch.testing.assert_close(embedding[None], model(ids).last_hidden_state.detach(), atol=1e-5, rtol=1e-5)


def test_clip_is_the_pooled_state_whatever_the_padding(folders):
    from transformers import AutoTokenizer, CLIPTextModel

    embedder = build(folders["clip"], 77)
    tokenizer, model = AutoTokenizer.from_pretrained(folders["clip"]), CLIPTextModel.from_pretrained(folders["clip"])
    embeddings = embedder(PROMPTS)
    assert embeddings.shape == (3, 64) and embedder.pooled and embedder.width == 64
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        alone = model(torch.tensor([tokenizer(prompt).input_ids])).pooler_output.detach()  # not padded
        torch.testing.assert_close(embedding[None], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_batch_equals_one_at_a_time(folders, kind):
    embedder = build(folders[kind], 48)
    alone = torch.cat([embedder([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(embedder(PROMPTS), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_in_a_dtype_is_casting_to_it(folders, kind, dtype):
    loaded, cast = build(folders[kind], 16, dtype), build(folders[kind], 16).to(dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype} and not any(p.requires_grad for p in loaded.parameters())
    embedding = loaded(PROMPTS)
    assert embedding.dtype == dtype and torch.equal(embedding, cast(PROMPTS))


def test_fp16_keeps_what_leaves_its_range(folders):
    embedder = build(folders["t5"], 16, torch.float16)
    kept = {name for name, p in embedder.encoder.named_parameters() if p.dtype == torch.float32}
    assert kept and all(name.endswith("wo.weight") for name in kept)
    embedding, exact = embedder(PROMPTS), build(folders["t5"], 16)(PROMPTS)
    assert embedding.dtype == torch.float16
    torch.testing.assert_close(embedding.float(), exact, atol=1e-2, rtol=1e-2)


def test_cut_texts_are_counted_and_reported_once(folders, monkeypatch):
    lines = []
    logger = logging.getLogger("opensora.test_text")
    monkeypatch.setattr("opensora.models.text.embedder.get_logger", lambda: logger)
    monkeypatch.setattr(logger, "warning", lambda message, *values: lines.append(message % values))
    embedder = build(folders["t5"], 8)
    embedder(["a red circle"])
    assert embedder.tokens_cut == 0 and not lines
    embedder(["a red circle", "a red circle moving left. 12 FPS."])  # 10 tokens and the end
    assert embedder.tokens_cut > 0 and len(lines) == 1 and "max_length=8" in lines[0]
    first = embedder.tokens_cut
    embedder(["a red circle moving left. 12 FPS."])
    assert embedder.tokens_cut == 2 * first and len(lines) == 1
    assert (embedder.texts_seen, embedder.texts_cut) == (4, 2)
    assert embedder.tokenize(["a red circle moving left. 12 FPS."])[0, -1] == 1  # the end of text is kept


def test_width_needs_no_weights(folders, tmp_path):
    for kind in ("t5", "clip"):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(Path(folders[kind]) / "config.json", folder)
        assert text_width(str(folder)) == 64


def test_width_of_a_whole_clip(folders, tmp_path):
    """The published CLIP folder holds an image encoder too: model_type clip, the text's settings nested."""
    text = json.loads((Path(folders["clip"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text, "vision_config": {}}))
    assert text_width(str(tmp_path)) == 64


@pytest.mark.parametrize(
    "config, error, words",
    [
        (None, FileNotFoundError, "neither a folder with the config.json"),
        ({"model_type": "bert"}, ValueError, "is a 'bert'"),
    ],
)
def test_folders_that_are_no_text_encoder(tmp_path, monkeypatch, config, error, words):
    folder = tmp_path / "encoder"
    folder.mkdir()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words) as raised:
        build(str(folder), 16)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("kind, name", [("t5", "shared.weight"), ("clip", "text_model.final_layer_norm.weight")])
def test_missing_weights_are_an_error(folders, tmp_path, kind, name):
    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .* weights"):
        build(str(folder), 16)


def test_settings_that_cannot_be(folders):
    with pytest.raises(ValueError, match=r"shardformer=True is for T5, and '.*' is a 'clip_text_model'"):
        build(folders["clip"], 16, shardformer=True)
    with pytest.raises(ValueError, match="max_length=78 is beyond the 77 positions"):
        build(folders["clip"], 78)
