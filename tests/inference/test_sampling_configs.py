"""Every config of configs/diffusion/inference samples: with tiny models, with the demo's text encoders."""

import itertools
import json
from dataclasses import dataclass, replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from shapes_world import REPOSITORY

from opensora.config import load_config
from opensora.diffusion.random import derive_seed
from opensora.inference.image_first import image_pipeline
from opensora.inference.phases import PhaseMeter
from opensora.inference.pipeline import Request
from opensora.inference.plan import make_plan
from opensora.inference.run import sample_all
from opensora.inference.settings import InferenceSettings, check_paths, require_available, validate
from opensora.inference.text_phase import embed_texts
from opensora.parallel.context import ALONE, ParallelContext, RankGroup

CONFIGS = REPOSITORY / "configs/diffusion/inference"


def tiny(section, **settings):
    small = {"from_pretrained": None, "hidden_size": 48, "num_heads": 2, "depth": 1, "depth_single_blocks": 1}
    small |= {"axes_dim": [8, 8, 8], "mlp_ratio": 2.0, "vec_in_dim": 64, "context_in_dim": 64, **settings}
    return [part for name, value in small.items() for part in (f"--{section}.{name}", str(value).lower())]


HUNYUAN = [
    *("--ae.from_pretrained", "none", "--ae.norm_num_groups", "4", "--ae.block_out_channels", "[8,8,8,8]"),
    *("--ae.layers_per_block", "1", "--num_frames", "5", "--resolution", "64px", "--aspect_ratio", "1:1"),
]
LINEAR = ["--ae", "dict(type='linear_causal', from_pretrained='ckpts/shapes/ae.safetensors')", "--num_frames", "5"]
FLUX_AE = ["from_pretrained", "none", "ch", "32", "ch_mult", "[1,1,1,1]", "num_res_blocks", "1"]


def flux_ae(section):
    return [f"--{section}.{part}" if i % 2 == 0 else part for i, part in enumerate(FLUX_AE)]


IMAGE_MODEL = [*tiny("img_flux"), *flux_ae("img_flux_ae"), "--img_resolution", "128px"]
TINY = {
    "256px": HUNYUAN,
    "256px_tp": LINEAR,
    "768px": LINEAR,
    "t2i2v_256px": [*LINEAR, *IMAGE_MODEL],
    "t2i2v_768px": [*LINEAR, *IMAGE_MODEL],
    "t2i_768px": flux_ae("ae"),
}


@pytest.fixture(scope="module")
def context():
    context = ParallelContext.create()
    yield context
    context.close()


@pytest.fixture
def load(shapes, tmp_path, monkeypatch):
    """load(config, *overrides) -> its settings, with tiny models and without several GPUs."""
    monkeypatch.chdir(shapes.root)

    def load(name, *overrides):
        one_gpu = [part for plugin in ("plugin", "plugin_ae") for part in (f"--{plugin}", "none")]
        encoders = ["--t5.from_pretrained", "ckpts/shapes/t5", "--clip.from_pretrained", "ckpts/shapes/clip"]
        lengths = ["--t5.max_length", "16", "--clip.max_length", "16", "--t5.shardformer", "False"]
        few = ["--num_steps", "2", "--save_dir", str(tmp_path / "samples"), "--dtype", "fp32", "--prompt", "sea"]
        cfg = load_config(
            [
                str(CONFIGS / f"{name}.py"),
                *(*encoders, *lengths[: 4 if name == "t2i_768px" else 6], *few, *one_gpu, *tiny("model"), *TINY[name]),
                *overrides,
            ],
            InferenceSettings,
        )
        validate(cfg, 1)
        require_available(cfg)
        check_paths(cfg)
        return cfg

    return load


def test_all_configs_are_here():
    assert sorted(TINY) == sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "shapes")


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.mark.parametrize(
    ("name", "folder", "size"),
    [
        ("256px", "video_64px", (64, 64)),
        ("256px_tp", "video_256px", (192, 336)),
        ("768px", "video_768px", (576, 1024)),
    ],
)
def test_text_to_video(load, context, name, folder, size, tmp_path):
    sample_all(load(name), context)
    folder = tmp_path / "samples" / folder
    assert sorted(path.name for path in folder.iterdir()) == ["phases.json", "prompt_0000.mp4", "prompt_0000.txt"]
    assert frames_of(folder / "prompt_0000.mp4").shape == (5, *size, 3)


def test_text_to_image(load, context, tmp_path):
    sample_all(load("t2i_768px", "--resolution", "256px"), context)
    with Image.open(tmp_path / "samples/image_256px/prompt_0000.png") as image:
        assert image.size == (336, 192) and json.loads(image.text["comment"])["text"] == "sea"


@dataclass(frozen=True)
class Rank:
    """A part of a job's ranks, one after the other."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device = torch.device("cpu")
    tensor = sequence = ALONE

    @property
    def model(self):
        share = self.world_size // self.data_parallel_size
        return RankGroup(self.rank % share, share)

    def share_samples(self, tensor_size, sequence_size):
        return self

    def on_main(self, work):
        return work()


def test_an_image_then_the_video_from_it(load, context, tmp_path, said):
    cfg = load("t2i2v_256px", "--num_sample", "2", "--offload", "True", "--crf", "0")
    sample_all(cfg, context)
    folder = tmp_path / "samples/video_256px"
    images = [folder / f"generated_condition/prompt_0000_{k}.png" for k in range(2)]
    videos = [folder / f"prompt_0000_{k}.mp4" for k in range(2)]
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(
        [p.name for p in (*images, *videos)] + ["contact_sheet.png", "phases.json"] + [p.stem + ".txt" for p in videos]
    )
    pictures = [np.asarray(Image.open(path)).astype(int) for path in images]
    assert pictures[0].shape == (96, 160, 3) and np.abs(pictures[0] - pictures[1]).mean() > 1
    comment = json.loads(av.open(str(videos[0])).metadata["comment"])
    assert comment["condition"] == "i2v_head" and comment["references"] == [str(images[0])]
    phases = json.loads((folder / "phases.json").read_text())["phases"]
    assert list(phases) == ["text", "load image", "diffusion", "decode", "write", "load", "condition"]

    stamps = [path.stat().st_mtime_ns for path in images]
    kept = frames_of(videos[1])
    videos[1].unlink()
    sample_all(cfg, context)  # what is missing is drawn from the image that is there
    assert [path.stat().st_mtime_ns for path in images] == stamps and np.array_equal(frames_of(videos[1]), kept)
    videos[1].unlink()
    images[1].write_bytes(images[0].read_bytes())  # not this sample's
    sample_all(cfg, context)
    assert np.array_equal(np.asarray(Image.open(images[1])).astype(int), pictures[1])
    assert np.array_equal(frames_of(videos[1]), kept)

    arguments = ["t2i2v_256px", "--num_sample", "2", "--crf", "0"]
    for changes, difference in (
        ([], None),
        (["--cond_type", "i2v_tail"], '(prompt_0000_0.mp4: condition is "i2v_head", not "i2v_tail")'),
        (["--ref", str(images[1])], "(prompt_0000_0.mp4: references is"),
    ):
        said.clear()
        make_plan(load(*arguments, *changes))
        complaints = [line for line in said if "not what you ask for" in line]
        assert len(complaints) == (difference is not None) and (not complaints or difference in complaints[0])


def test_the_image_is_the_image_models_own(load, context, tmp_path):
    """By the formulas of spec 10: one velocity a step, guidance 4 told to the model, Euler steps on its schedule."""
    cfg = load("t2i2v_256px")
    plan = make_plan(cfg)
    device, seed = torch.device("cpu"), derive_seed(cfg.seed, 0, 0, "image")
    texts = embed_texts(cfg, ["sea", ""], torch.float32, device)
    torch.manual_seed(3)
    pipeline = image_pipeline(cfg, plan.first_frame, texts, device, PhaseMeter(device))
    assert (plan.first_frame.height, plan.first_frame.width) == (96, 160)
    generator = torch.Generator().manual_seed(1)
    model = pipeline.sampler.model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    got = pipeline.sample_latents([Request("sea", seed)])  # [1, 16, 1, 12, 20]

    h, w = 6, 10
    ids = torch.stack([torch.zeros(h, w), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")], dim=-1)
    x = torch.randn((16, 1, 12, 20), generator=torch.Generator().manual_seed(seed))[None]
    x = x.view(1, 16, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w, 64)
    alpha = 1 + (h * w - 256) * 2 / 3840  # of one latent frame
    times = [alpha * t / (1 + (alpha - 1) * t) for t in (1.0, 0.5, 0.0)]
    for t, t_next in itertools.pairwise(times):
        velocity = model(
            img=x,
            img_ids=ids.view(1, h * w, 3).float(),
            txt=texts[0](["sea"]),
            txt_ids=torch.zeros(1, 16, 3),
            timesteps=torch.tensor([t]),
            y_vec=texts[1](["sea"]),
            guidance=torch.tensor([4.0]),
        )
        x = x + (t_next - t) * velocity
    expected = x.view(1, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 1, 12, 20)
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)


def test_rows_that_have_a_reference_keep_it(load, context, tmp_path):
    Image.new("RGB", (160, 96), (250, 10, 10)).save(tmp_path / "red.png")
    (tmp_path / "list.csv").write_text("text,ref\nwith,red.png\nwithout,\n")
    cfg = load("t2i2v_256px", "--prompt", "none", "--dataset.data-path", str(tmp_path / "list.csv"))
    sample_all(cfg, context)
    folder = tmp_path / "samples/video_256px"
    assert [path.name for path in (folder / "generated_condition").iterdir()] == ["list_0001.png"]
    comment = json.loads(av.open(str(folder / "list_0000.mp4")).metadata["comment"])
    assert comment["references"] == [str(tmp_path / "red.png")]


def test_ranks_that_share_a_model_draw_the_same_and_one_of_them_writes(load, tmp_path):
    (tmp_path / "list.txt").write_text("one\ntwo\n")
    cfg = load("t2i2v_256px", "--prompt", "none", "--dataset.data-path", str(tmp_path / "list.txt"))
    second = Rank(rank=1, world_size=4, data_parallel_rank=0, data_parallel_size=2)
    folder = tmp_path / "samples/video_256px"
    sample_all(cfg, second)
    assert not list(folder.glob("*.mp4"))
    assert [path.name for path in (folder / "generated_condition").iterdir()] == ["list_0000.png"]
    sample_all(cfg, replace(second, rank=0))
    assert [path.name for path in folder.glob("*.mp4")] == ["list_0000.mp4"]
    assert not (folder / "contact_sheet.png").exists()
    sample_all(cfg, replace(second, rank=0))  # what is not there yet is shared anew
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["list_0000.mp4", "list_0001.mp4"]
    assert (folder / "contact_sheet.png").exists() and (folder / "phases_rank1.json").exists()
