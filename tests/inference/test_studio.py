"""One loaded model for many wishes, and the page in front of it."""

import importlib.util
import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shapes_world import REPOSITORY

from opensora.config import load_config
from opensora.inference import plan
from opensora.inference.settings import InferenceSettings
from opensora.inference.studio import Studio, Wish
from opensora.models.weights import build_model

CONFIG = """
dtype = "fp32"
fps_save = 8
crf = 0  # x264 makes much of differences in the last bit otherwise
sampling_option = dict(resolution="64px", aspect_ratio="1:1", num_frames=9, num_steps=3, guidance=3.0)
model = dict(
    type="flux", from_pretrained="./studio.safetensors", guidance_embed=False, fused_qkv=False, use_liger_rope=True,
    in_channels=64, vec_in_dim=64, context_in_dim=64, hidden_size=48, mlp_ratio=2.0, num_heads=2, depth=1,
    depth_single_blocks=1, axes_dim=[8, 8, 8], theta=10000, qkv_bias=True, cond_embed=True,
)
ae = dict(type="linear_causal", from_pretrained="./ckpts/shapes/ae.safetensors")
t5 = dict(type="text_embedder", from_pretrained="./ckpts/shapes/t5", max_length=32)
clip = dict(type="text_embedder", from_pretrained="./ckpts/shapes/clip", max_length=32)
"""
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
APP = "scripts/diffusion/app.py"


@pytest.fixture(scope="module")
def config(shapes):
    """With weights that are not the initial ones, whose velocity is 0 whatever they are told."""
    (shapes.root / "studio.py").write_text(CONFIG)
    settings = load_config([str(shapes.root / "studio.py")], InferenceSettings).model
    model = build_model({**settings, "from_pretrained": None}, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_file(model.state_dict(), shapes.root / "studio.safetensors")
    return "studio.py"


@pytest.fixture
def studio(shapes, config, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes.root)
    return Studio(load_config([config, "--save-dir", str(tmp_path)], InferenceSettings), torch.device("cpu"))


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def test_a_wish_is_what_the_command_draws(shapes, config, studio, tmp_path):
    steps = []
    option = {"num_steps": 2, "guidance": 2.0, "num_frames": 5}
    path = studio.draw(Wish("a red, circle", seed=7, option=option), lambda: steps.append(1))
    assert path == tmp_path / "studio/00001/video_64px/prompt_0000.mp4" and len(steps) == 2
    same = ["--num-steps", "2", "--guidance", "2.0", "--num-frames", "5", "--seed", "7"]
    where = ["--save-dir", str(tmp_path / "command")]
    shapes.run("scripts/diffusion/inference.py", config, "--prompt", "a red, circle", *same, *where)
    theirs = frames(tmp_path / "command/video_64px/prompt_0000.mp4")
    assert theirs.shape == (5, 64, 64, 3) and np.abs(frames(path) - theirs).mean() < 0.05
    other = studio.draw(Wish("a red, circle", seed=8, option=option))
    assert other.parts[-3] == "00002" and np.abs(frames(other) - theirs).mean() > 2
    for prompt, changed in (("a blue square", {}), ("a red, circle", {"guidance": 4.0})):
        other = studio.draw(Wish(prompt, seed=7, option=option | changed))
        assert np.abs(frames(other) - theirs).mean() > 0.2
    with av.open(str(path)) as container:
        comment = json.loads(container.metadata["comment"])
    assert comment["weights"] == "studio.safetensors" and comment["lora"] is None


def test_images_references_and_wishes_that_do_not_fit(studio, tmp_path):
    image = studio.draw(Wish("a", option={"num_frames": 1}))
    assert image.suffix == ".png" and Image.open(image).size == (64, 64)
    given = (200, 100, 50)
    Image.new("RGB", (64, 64), given).save(tmp_path / "given.png")
    video = frames(studio.draw(Wish("a", cond_type="i2v_head", references=(str(tmp_path / "given.png"),))))
    assert np.abs(video[0] - given).mean() < 12 < np.abs(video[4] - given).mean()
    for wish, said in (
        (Wish("a", option={"num_frames": 7}), "num_frames"),
        (Wish(""), "is empty"),
        (Wish("a", cond_type="i2v_head"), "needs a reference"),
        (Wish("a", cond_type="i2v_head", references=(str(tmp_path / "none.png"),)), "none.png"),
        (Wish("a", option={"aspect_ratio": "7:5"}), "7:5"),
        (Wish("a", motion_score="much"), "motion_score"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            studio.draw(wish)
    assert sorted(path.name for path in (tmp_path / "studio").iterdir()) == ["00001", "00002"]


def test_what_the_page_may_ask_for(shapes, config, tmp_path, monkeypatch):
    def refine(cfg, prompts, is_image, folder, part):  # as the language model's, which keeps its answers there
        (folder / "refined_prompts.json").touch()
        return [replace(prompt, motion="6") for prompt in prompts]

    monkeypatch.chdir(shapes.root)
    weights = shutil.copy("studio.safetensors", tmp_path / "model.safetensors")
    size = ["--sampling_option.height", "32", "--sampling_option.width", "64", "--num-frames", "5", "--num-steps", "1"]
    settings = [config, "--save-dir", str(tmp_path), "--ckpt-path", str(weights), "--motion-score", "4", *size]
    studio = Studio(load_config(settings, InferenceSettings), torch.device("cpu"))
    weights.unlink()  # as of a run that keeps only its newest checkpoints
    assert told(studio.draw(Wish("a"))) == ("a. 8 FPS. 4 motion score.", "video_64x32")
    assert told(studio.draw(Wish("a", motion_score=""))) == ("a. 8 FPS.", "video_64x32")
    square = {"resolution": "64px", "aspect_ratio": "1:1"}
    assert told(studio.draw(Wish("a", option=square)))[1] == "video_64px"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(plan, "refine", refine)
    assert told(studio.draw(Wish("a", motion_score="dynamic")))[0] == "a. 8 FPS. 6 motion score."


def told(path):
    """The text that a sample's model was told, and the folder that it is in."""
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"])["text"], path.parent.name


def test_an_address_that_is_taken_is_said_before_models_are_loaded():
    spec = importlib.util.spec_from_file_location("app", REPOSITORY / APP)
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("127.0.0.1", 70_000), ("192.0.2.1", port)):
            with pytest.raises(ValueError, match=f"host={host}, port={number}: no page can be served there"):
                app.check_address(host, number)
    app.check_address("127.0.0.1", port)


@pytest.mark.skipif(HAS_GRADIO, reason="gradio is there")
def test_without_gradio_the_page_says_what_to_install(shapes, config):
    failed = shapes.run(APP, config, check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip() == 'error: the page needs the package gradio: pip install -e ".[app]"'


@pytest.mark.skipif(not HAS_GRADIO, reason="gradio is not there")
def test_the_page_over_http(shapes, config, tmp_path):
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = shapes.start(APP, config, "--save-dir", tmp_path / "app", "--port", port)
    try:
        wait_for(port, process)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "got"))
        wish = {"prompt": "a red circle", "references": None, "num_frames": 5, "num_steps": 2, "api_name": "/draw"}
        video, image, said = client.predict(**wish)
        assert image is None and said.startswith(str(tmp_path / "app/studio/00001/video_64px/prompt_0000.mp4 in "))
        assert frames(video).shape == (5, 64, 64, 3)
        with pytest.raises(Exception, match="num_frames"):
            client.predict(**{**wish, "num_frames": 7})
        _, image, _ = client.predict(**{**wish, "num_frames": 1})
        assert Path(image).exists()
    finally:
        process.terminate()
        process.communicate(timeout=120)


def wait_for(port, process, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    process.kill()
    raise AssertionError(process.communicate()[1][-3000:])
