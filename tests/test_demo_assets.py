"""What the demo is made of and measured by: files, prompts, encoders, and a score that is right."""

import csv
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.models.autoencoder import LinearCausal
from opensora.models.text import TextEmbedder

DEMO = Path(__file__).parents[1] / "scripts/demo"


@pytest.fixture
def demo(monkeypatch):
    """The scripts import each other by name, as when they are run."""
    monkeypatch.syspath_prepend(str(DEMO))
    import make_shapes
    import measure
    import render
    import score

    class Modules:
        pass

    modules = Modules()
    modules.make_shapes, modules.measure, modules.render, modules.score = make_shapes, measure, render, score
    return modules


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def words(text: str) -> list[str]:
    return text.rstrip(".").split()


def one_clip_per_prompt(root: Path) -> dict[str, Path]:
    """The 48 prompts, without a full stop -> a clip of nine frames of each."""
    table = rows(root / "datasets/shapes.csv")[:48]
    return {" ".join(words(row["text"])): root / row["path"] for row in table}


# ---- the files


def test_the_table_covers_every_prompt_in_several_buckets(shapes):
    table = rows(shapes.root / "datasets/shapes.csv")
    assert len(table) == 288
    clips = [words(row["text"]) for row in table if row["path"].endswith(".mp4")]
    images = [words(row["text"]) for row in table if row["path"].endswith(".png")]
    expected = {
        ("a", colour, shape, "moving", direction)
        for colour in ("red", "green", "blue", "yellow")
        for shape in ("circle", "square", "triangle")
        for direction in ("left", "right", "up", "down")
    }
    assert set(map(tuple, clips)) == expected and len(clips) == 5 * 48
    assert set(map(tuple, images)) == {words[:3] for words in expected} and len(images) == 48
    prompts = [row["text"] for row in rows(shapes.root / "datasets/shapes_prompts.csv")]
    assert len(prompts) == 48 and {tuple(words(prompt)) for prompt in prompts} == expected
    counts = {(row["num_frames"], row["height"], row["width"]) for row in rows(shapes.root / shapes.table)}
    assert counts == {("1", "64", "64"), ("5", "64", "64"), ("9", "64", "64")}


def test_the_files_are_real_videos(shapes):
    path = one_clip_per_prompt(shapes.root)["a red circle moving left"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 12, 9)


def test_the_colours_are_clean(shapes, demo):
    for prompt, path in one_clip_per_prompt(shapes.root).items():
        frame = demo.render.read_frames(path)[4].astype(int)
        drawn = frame[np.abs(frame - demo.render.BACKGROUND).sum(-1) > 120]
        error = np.median(drawn, axis=0) - demo.render.COLOURS[prompt.split()[1]]
        assert np.abs(error).max() < 12, prompt


def test_files_are_the_same_each_time_and_differ_by_seed(demo, tmp_path):
    contents = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        files = [tmp_path / name / demo.make_shapes.write_one(tmp_path / name, i, seed) for i in (0, 47, 100)]
        contents[name] = [path.read_bytes() for path in files]
    assert contents["one"] == contents["again"]
    assert all(a != b for a, b in zip(contents["one"], contents["other"], strict=True))


def test_what_is_complete_is_left_alone(shapes):
    made = shapes.root / "ckpts/shapes/ae.safetensors"
    before = made.stat().st_mtime_ns
    done = shapes.run("scripts/demo/make_shapes.py", "--num", "288")
    assert "complete" in done.stdout and made.stat().st_mtime_ns == before


def test_what_is_not_complete_is_found(shapes, demo, tmp_path):
    recipe = {"num": 288, "seed": 0, "source": demo.make_shapes.source_hash()}
    paths = shapes.root, shapes.root / "datasets/shapes.csv", shapes.root / "datasets/shapes/made.json"
    assert demo.make_shapes.is_complete(*paths, recipe)
    assert not demo.make_shapes.is_complete(*paths, {**recipe, "num": 480})
    clip = one_clip_per_prompt(shapes.root)["a blue square moving up"]
    aside = clip.rename(tmp_path / clip.name)
    try:
        assert not demo.make_shapes.is_complete(*paths, recipe)
    finally:
        aside.rename(clip)


# ---- autoencoder and text encoders


def test_the_autoencoder_keeps_26_decibels_and_what_is_shown(shapes, demo):
    autoencoder = LinearCausal(str(shapes.root / "ckpts/shapes/ae.safetensors"))
    clips = one_clip_per_prompt(shapes.root)
    frames = np.stack([demo.render.read_frames(path) for path in clips.values()])
    video = torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1
    decoded = autoencoder.decode(autoencoder.encode(video)).clamp(-1, 1)
    assert 10 * torch.log10(4 / (decoded - video).square().mean()) > 26
    shown = [demo.measure.measure(clip) for clip in ((decoded + 1) * 127.5).round().byte().movedim(1, -1).numpy()]
    assert [subject.prompt for subject in shown] == list(clips)


def captions() -> tuple[list[str], list[list[str]]]:
    """The 48 prompts as the encoders get them, and their words for colour, shape and direction."""
    prompts = [
        [colour, shape, direction]
        for colour in ("red", "green", "blue", "yellow")
        for shape in ("circle", "square", "triangle")
        for direction in ("left", "right", "up", "down")
    ]
    return [f"a {c} {s} moving {d}. 12 FPS." for c, s, d in prompts], prompts


def test_t5_gives_each_word_a_token_and_spells_others(shapes):
    embedder = TextEmbedder(str(shapes.root / "ckpts/shapes/t5"), 16)
    texts, _ = captions()
    tokens = embedder.tokenize(texts)
    assert len({tuple(ids.tolist()) for ids in tokens}) == 48 and embedder.tokens_cut == 0
    assert (tokens != 0).sum(1).max() <= 11  # words, full stops and the end
    pieces = embedder.tokenizer.convert_ids_to_tokens(embedder.tokenize(["24 FPS, 4 motion score. owl"])[0].tolist())
    assert pieces[:11] == ["▁24", "▁FPS", ",", "▁4", "▁motion", "▁score", ".", "▁", "o", "w", "l"]
    embeddings = embedder(texts).flatten(1)
    assert torch.pdist(embeddings).min() > 0.5 * embeddings.shape[1] ** 0.5 / 16**0.5  # a word is a 16th of the whole


def test_clip_tells_colour_shape_and_direction_by_a_linear_map(shapes):
    """Fitted on 40 prompts, right on the 8 others: what the words mean is there to be learnt, one by one."""
    embedder = TextEmbedder(str(shapes.root / "ckpts/shapes/clip"), 77)
    texts, answers = captions()
    vectors = embedder(texts).double()
    assert torch.pdist(vectors).min() > 0.5
    features = torch.cat([(vectors - vectors.mean(0)) / vectors.std(), torch.ones(48, 1)], dim=1)
    for kind in range(3):
        names = sorted({answer[kind] for answer in answers})
        labels = torch.tensor([names.index(answer[kind]) for answer in answers])
        wanted = torch.nn.functional.one_hot(labels).double()
        for fold in range(6):
            held = torch.zeros(48, dtype=torch.bool)
            held[torch.randperm(48, generator=torch.Generator().manual_seed(fold))[:8]] = True
            gram = features[~held].T @ features[~held] + 0.1 * torch.eye(65)
            weights = torch.linalg.solve(gram, features[~held].T @ wanted[~held])
            assert ((features[held] @ weights).argmax(1) == labels[held]).all()


# ---- the score


def test_the_dataset_scores_full_marks(shapes, demo):
    for prompt, path in one_clip_per_prompt(shapes.root).items():
        assert demo.measure.measure(demo.render.read_frames(path)).prompt == prompt


def test_blurred_and_noisy_clips_are_still_read(shapes, demo):
    rng = np.random.default_rng(0)
    for prompt, path in one_clip_per_prompt(shapes.root).items():
        frames = demo.render.read_frames(path).astype(np.float32)
        frames = np.moveaxis(demo.measure.smooth(np.moveaxis(frames, -1, 1)), 1, -1)
        noisy = np.clip(frames + 25 * rng.standard_normal(frames.shape), 0, 255).astype(np.uint8)
        assert demo.measure.measure(noisy).prompt == prompt


def test_noise_scores_chance(shapes, demo):
    """As an untrained model samples: latents of pure noise, decoded."""
    autoencoder = LinearCausal(str(shapes.root / "ckpts/shapes/ae.safetensors"))
    latents = torch.randn(144, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    clips = ((autoencoder.decode(latents).clamp(-1, 1) + 1) * 127.5).byte().movedim(1, -1).numpy()
    shown = [demo.measure.measure(clip) for clip in clips]
    asked = demo.render.subjects() * 3
    for aspect, chance in demo.score.CHANCE.items():
        right = np.mean([getattr(s, aspect) == getattr(a, aspect) for s, a in zip(shown, asked, strict=True)])
        assert abs(right - chance) < 4 * (chance * (1 - chance) / 144) ** 0.5, aspect


def test_score_script(shapes, demo, tmp_path, monkeypatch, capsys):
    """24 prompts are what the clips show, 24 name another colour; and the files that a user looks at are there."""
    folder = tmp_path / "samples/shapes"
    (folder / "video_64px").mkdir(parents=True)
    other = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "red"}
    asked = {}
    for index, (prompt, path) in enumerate(one_clip_per_prompt(shapes.root).items()):
        name = f"video_64px/shapes_prompts_{index:04d}"
        (folder / f"{name}.mp4").write_bytes(path.read_bytes())
        colour = prompt.split()[1]
        asked[f"{name}.mp4"] = prompt if index % 2 else prompt.replace(colour, other[colour])
        (folder / f"{name}.txt").write_text(asked[f"{name}.mp4"] + ". 12 FPS.\n")
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "loss": 1 / (i + 1), "lr": 1e-3, "grad_norm": 0.5} for i in range(30)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    Image.new("RGB", (8, 8)).save(folder / "contact_sheet.png")  # of an earlier time: no sample

    monkeypatch.setattr(sys, "argv", ["score.py", str(folder), "--train-metrics", str(metrics)])
    demo.score.main()
    assert json.loads((folder / "score.json").read_text()) == {"colour": 0.5, "direction": 1.0, "shape": 1.0}
    printed = capsys.readouterr().out
    assert "50.0%" in printed and "of 48 files" in printed
    assert {row["file"]: row["prompt"] for row in rows(folder / "prompts.csv")} == asked
    for name in ("contact_sheet.png", "loss.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 500

    monkeypatch.setattr(sys, "argv", ["score.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"no \.mp4 or \.png file with a prompt"):
        demo.score.main()
