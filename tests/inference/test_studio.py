"""One loaded model for many wishes, and the page in front of it."""

import importlib.util
import socket
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config import load_config
from opensora.inference.settings import InferenceSettings
from opensora.inference.studio import Studio, Wish

CONFIG = """
dtype = "fp32"
fps_save = 8
sampling_option = dict(resolution="64px", aspect_ratio="1:1", num_frames=9, num_steps=3, guidance=3.0)
model = dict(
    type="flux", from_pretrained=None, guidance_embed=False, fused_qkv=False, use_liger_rope=True, in_channels=64,
    vec_in_dim=64, context_in_dim=64, hidden_size=48, mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1,
    axes_dim=[8, 8, 8], theta=10000, qkv_bias=True, cond_embed=True,
)
ae = dict(type="linear_causal", from_pretrained="./ckpts/shapes/ae.safetensors")
t5 = dict(type="text_embedder", from_pretrained="./ckpts/shapes/t5", max_length=32)
clip = dict(type="text_embedder", from_pretrained="./ckpts/shapes/clip", max_length=32)
"""
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
APP = "scripts/diffusion/app.py"


@pytest.fixture(scope="module")
def config(shapes):
    (shapes.root / "studio.py").write_text(CONFIG)
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
    assert theirs.shape == (5, 64, 64, 3) and np.abs(frames(path) - theirs).mean() < 0.4
    other = studio.draw(Wish("a red, circle", seed=8, option=option))
    assert other.parts[-3] == "00002" and np.abs(frames(other) - theirs).mean() > 2


def test_images_references_and_wishes_that_do_not_fit(studio, tmp_path):
    image = studio.draw(Wish("a", option={"num_frames": 1}))
    assert image.suffix == ".png" and Image.open(image).size == (64, 64)
    start = studio.draw(Wish("a", cond_type="i2v_head", references=(str(image),)))
    given = np.asarray(Image.open(image)).astype(int)
    video = frames(start)
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
        process.communicate(timeout=30)


def wait_for(port, process, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    process.kill()
    raise AssertionError(process.communicate()[1][-3000:])
