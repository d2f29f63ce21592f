import io
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from PIL import Image

from opensora.inference import plan as planning
from opensora.inference import run
from opensora.inference.comparison import first_difference
from opensora.inference.output import write_mp4
from opensora.inference.pipeline import Pipeline
from opensora.inference.prompts import Prompt
from opensora.inference.size import SampleSize
from opensora.inference.text_phase import EmbeddedTexts
from opensora.parallel.context import ALONE, RankGroup


@dataclass
class Place:
    """What a rank needs to know, without a job of several processes."""

    rank: int = 0
    world_size: int = 1
    share: int = 1  # ranks that share a model
    device = torch.device("cpu")
    tensor = sequence = ALONE

    @property
    def model(self):
        return RankGroup(self.rank % self.share, self.share)

    def share_samples(self, tensor_size, sequence_size):
        return self

    @property
    def data_parallel_rank(self):
        return self.rank // self.share

    @property
    def data_parallel_size(self):
        return self.world_size // self.share

    def on_main(self, work):
        return work()


def config(tmp_path, **settings):
    option = {"height": 32, "width": 48, "num_frames": 9, "num_steps": 3, "guidance": 3.0, "seed": None}
    return ConfigDict(
        {
            "save_dir": str(tmp_path / "samples"),
            "prompt": None,
            "neg": "",
            "ref": None,
            "cond_type": "t2v",
            "dataset": {"type": "text"},
            "start_index": None,
            "end_index": None,
            "num_sample": 1,
            "batch_size": 1,
            "motion_score": None,
            "fps_save": 8,
            "crf": 0,  # every pixel is kept: x264 may choose other bits for the same pixels otherwise
            "seed": 42,
            "dtype": "fp32",
            "offload": False,
            "plugin": None,
            "plugin_ae": None,
            "use_t2i2v": False,
            "refine_prompt": False,
            "refine_model": "none",
            "use_ema": False,
            "lora": None,
            "lora_scale": 1.0,
            "model": {"type": "flux", "cond_embed": True},
            "ae": {"type": "linear_causal"},
            **settings,
            "sampling_option": {**option, **settings.get("sampling_option", {})},
        }
    )


@pytest.fixture(autouse=True)
def no_tokenizers(monkeypatch):
    monkeypatch.setattr(planning, "report_long_texts", lambda *_: None)


@pytest.fixture
def sample(toy_pipeline, hash_text, monkeypatch):
    """sample(cfg, rank=..., world_size=...) with stand-ins for models -> {path under save_dir: content} of samples."""
    embed = lambda cfg, texts, *_: tuple(EmbeddedTexts(hash_text(*s), texts, 2) for s in ((5, 12), (8,)))  # noqa: E731
    build = lambda _, cfg, size, weights, lora, device, texts, meter, _d: toy_pipeline(texts=texts, meter=meter)  # noqa: E731
    monkeypatch.setattr(run, "embed_texts", embed)
    monkeypatch.setattr(Pipeline, "from_config", classmethod(build))

    def sample(cfg, **place):
        run.sample_all(cfg, Place(**place))
        files = [path for path in Path(cfg.save_dir).rglob("*_0*") if path.suffix in (".mp4", ".txt")]
        return {str(path.relative_to(cfg.save_dir)): path.read_bytes() for path in sorted(files)}

    return sample


def prompt_list(tmp_path, count):
    path = tmp_path / "list.csv"
    path.write_text("text\n" + "".join(f'"prompt, {i}"\n' for i in range(count)))
    return {"type": "text", "data_path": str(path)}


def test_files_of_one_prompt(sample, tmp_path):
    files = sample(config(tmp_path, prompt="raining, sea"))
    assert list(files) == ["video_48x32/prompt_0000.mp4", "video_48x32/prompt_0000.txt"]
    assert files["video_48x32/prompt_0000.txt"] == b"raining, sea\n"


def test_names_follow_resolution_csv_and_sample_number(sample, tmp_path):
    option = {"height": None, "width": None, "resolution": "64px", "aspect_ratio": "1:1"}
    cfg = config(tmp_path, dataset=prompt_list(tmp_path, 2), num_sample=2, sampling_option=option)
    stems = ["list_0000_0", "list_0000_1", "list_0001_0", "list_0001_1"]
    assert [name for name in sample(cfg) if name.endswith("mp4")] == [f"video_64px/{stem}.mp4" for stem in stems]


def test_result_depends_neither_on_batch_size_nor_on_ranks_nor_on_the_part_of_the_list(sample, tmp_path):
    def cfg(name, **settings):
        data = prompt_list(tmp_path, 3)
        return config(tmp_path, dataset=data, num_sample=2, save_dir=str(tmp_path / name), **settings)

    one = sample(cfg("one"))
    assert len(one) == 12
    assert sample(cfg("batch", batch_size=4)) == one
    ranks = [sample(cfg(f"rank{rank}"), rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] | ranks[1] == one and len(ranks[0]) == len(ranks[1]) == 6
    part = sample(cfg("part", start_index=1, end_index=2))
    assert part == {name: content for name, content in one.items() if "list_0001" in name}


def test_ranks_share_the_list(sample, tmp_path):
    cfg = config(tmp_path, dataset=prompt_list(tmp_path, 5))
    assert [name[-8:] for name in sample(cfg, rank=1, world_size=2) if name.endswith("mp4")] == ["0001.mp4", "0003.mp4"]


def test_of_ranks_that_share_a_model_the_first_writes(sample, tmp_path):
    cfg = config(tmp_path, dataset=prompt_list(tmp_path, 3))
    assert sample(cfg, rank=1, world_size=4, share=2) == {}
    written = sample(cfg, rank=2, world_size=4, share=2)
    assert list(written) == ["video_48x32/list_0001.mp4", "video_48x32/list_0001.txt"]


def test_what_is_there_is_skipped(sample, tmp_path):
    cfg = config(tmp_path, dataset=prompt_list(tmp_path, 2))
    first = tmp_path / "samples" / "video_48x32" / "list_0000.mp4"
    first.parent.mkdir(parents=True)
    first.write_bytes(b"mine")
    files = sample(cfg)
    assert files["video_48x32/list_0000.mp4"] == b"mine" and len(files["video_48x32/list_0001.mp4"]) > 100
    stamp = (first.parent / "list_0001.mp4").stat().st_mtime_ns
    sample(cfg)
    assert (first.parent / "list_0001.mp4").stat().st_mtime_ns == stamp


def test_seeds(tmp_path):
    def seed(**settings):
        cfg = config(tmp_path, prompt="a", **settings)
        (job,) = planning.make_plan(cfg).jobs
        return planning.to_request(job, cfg, SampleSize(9, 32, 48, "toy")).seed

    assert seed(seed=0) == seed(seed=0) != seed(seed=1)
    assert seed(seed=5, sampling_option={"seed": 0}) == seed(seed=0)  # seed 0 is a seed, not "any"


def test_videos_are_told_rate_and_motion_images_are_not():
    video, image = SampleSize(9, 32, 48, "toy"), SampleSize(1, 32, 48, "toy")
    assert planning.model_text("a cat", video, 24, "4") == "a cat. 24 FPS. 4 motion score."
    assert planning.model_text("a cat", video, 24, None) == "a cat. 24 FPS."
    assert planning.model_text("a cat", image, 24, "4") == "a cat"


def test_prompts_without_reference_are_text_to_video(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    (tmp_path / "p.csv").write_text("text,ref\na,a.png\nb,\n")
    cfg = config(tmp_path, cond_type="i2v_head", dataset={"type": "text", "data_path": str(tmp_path / "p.csv")})
    plan = planning.make_plan(cfg)
    requests = [planning.to_request(job, cfg, plan.size) for job in plan.jobs]
    assert [request.condition for request in requests] == ["i2v_head", "t2v"]


def noise_png(side):
    """The first half of a file."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()[: content.tell() // 2]


def complaints(said):
    return [message for message in said if "not what you ask for" in message]


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({}, None),
        ({"batch_size": 4, "offload": True, "sampling_option": {"seed": 42}}, None),
        ({"prompt": "a dog"}, 'prompt is "a cat", not "a dog"'),
        ({"seed": 43}, "seed is 42, not 43"),
        ({"sampling_option": {"seed": 7}}, "seed is 42, not 7"),
        ({"neg": "blurry"}, 'negative is "", not "blurry"'),
        ({"fps_save": 12}, "fps_save is 8, not 12"),
        ({"motion_score": 4}, 'motion_score is "None", not "4"'),
        ({"sampling_option": {"guidance_img": 3.0, "image_osci": True}}, None),  # nothing is given here
        ({"model": {"type": "flux", "cond_embed": True, "compile": True}, "refine_model": "another"}, None),
        ({"sampling_option": {"num_frames": 13}}, "sampling_option.num_frames is 9, not 13"),
        ({"sampling_option": {"guidance": 5.0}}, "sampling_option.guidance is 3.0, not 5.0"),
    ],
)
def test_what_is_there_and_is_not_what_would_be_drawn_is_said(sample, tmp_path, said, settings, difference):
    cfg = config(tmp_path, prompt="a cat")
    sample(cfg)
    sample(config(tmp_path, **{"prompt": "a cat", **settings, "save_dir": cfg.save_dir}))
    expected = difference and f"1 of them are not what you ask for (prompt_0000.mp4: {difference}): give another"
    assert [message.split(" --save-dir")[0] for message in complaints(said)] == ([expected] if expected else [])


def told(cfg, tmp_path, comment=None):
    """What is said of a sample whose file has the comment of `cfg`."""
    plan = planning.plan_samples(cfg, *(tmp_path / name for name in ("weights", "lora")))
    (job,) = plan.wanted
    if comment is None:
        request = planning.to_request(job, cfg, plan.size)
        return json.loads(planning.tags_of(job, request, cfg, plan.model_files)["comment"])
    return first_difference(comment, told(cfg, tmp_path), plan.size.is_image)


def test_long_texts_are_shown_where_they_differ(tmp_path):
    common = "a wide shot of a harbour " * 10
    first, second = (config(tmp_path, prompt=f"{common}{end} and more" + " and more" * 20) for end in ("red", "blue"))
    difference = told(second, tmp_path, told(first, tmp_path))
    assert (
        difference.startswith("prompt is ...") and "harbour red and" in difference and "harbour blue and" in difference
    )
    assert len(difference) < 160


def test_the_same_file_under_another_name_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32)).save("a.png")
    here = config(tmp_path, prompt="a", cond_type="i2v_head", ref="a.png", t5={"from_pretrained": "./t5"})
    there = config(
        tmp_path, prompt="a", cond_type="i2v_head", ref=str(tmp_path / "a.png"), t5={"from_pretrained": "t5"}
    )
    assert told(there, tmp_path, told(here, tmp_path)) is None
    assert "condition" in told(config(tmp_path, prompt="a"), tmp_path, told(here, tmp_path))
    there.t5.from_pretrained = "other"
    assert told(there, tmp_path, told(here, tmp_path)).startswith("t5.from_pretrained is")


def test_of_refined_prompts_everything_but_the_text_is_compared(tmp_path):
    refined = told(config(tmp_path, prompt="a"), tmp_path)
    refined["config"]["refine_prompt"], refined["text"] = True, "a long text"
    cfg = config(tmp_path, prompt="a")
    assert told(cfg, tmp_path, refined) == "refine_prompt is true, not false"


def test_references_that_have_no_use_are_said_and_not_claimed(tmp_path, said):
    (tmp_path / "p.csv").write_text("text,ref\na,a.png\nb,\n")
    cfg = config(tmp_path, dataset={"type": "text", "data_path": str(tmp_path / "p.csv")})
    plan = planning.make_plan(cfg)
    assert "1 of 2 prompts have a reference, which cond_type='t2v' does not use" in said[-1]
    assert planning.to_request(plan.jobs[0], cfg, plan.size).references == ()


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"save_dir: .*file/video_48x32 cannot be written \(Not a directory\)"):
        planning.make_plan(config(tmp_path, prompt="a", save_dir=str(tmp_path / "file")))


def test_what_another_program_drew_is_known_by_the_text_beside_it(sample, tmp_path, said):
    path = tmp_path / "samples/video_48x32/prompt_0000.mp4"
    path.parent.mkdir(parents=True)
    write_mp4(path, torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8, 18)
    path.with_suffix(".txt").write_text("a dog")
    sample(config(tmp_path, prompt="a dog"))
    assert not complaints(said)
    sample(config(tmp_path, prompt="a cat"))
    assert "(prompt_0000.mp4: another prompt)" in complaints(said)[0]


def test_an_empty_file_is_no_sample(sample, tmp_path):
    path = tmp_path / "samples/video_48x32/prompt_0000.mp4"
    path.parent.mkdir(parents=True)
    path.touch()
    assert len(sample(config(tmp_path, prompt="a cat"))["video_48x32/prompt_0000.mp4"]) > 100


def test_calls_for_parts_of_a_list_leave_files_of_their_own(sample, tmp_path):
    data = prompt_list(tmp_path, 4)
    for start, end in ((0, 2), (2, None)):
        sample(config(tmp_path, dataset=data, start_index=start, end_index=end))
    left = {path.name for path in (tmp_path / "samples/video_48x32").iterdir() if not path.name.startswith("list")}
    parts = ("_0000-0001", "_0002-0003")
    assert left == {f"contact_sheet{part}.png" for part in parts} | {f"phases{part}.json" for part in parts}


def test_files_of_a_call(sample, tmp_path):
    cfg = config(tmp_path, dataset=prompt_list(tmp_path, 3), batch_size=2)
    folder = tmp_path / "samples/video_48x32"
    sample(cfg, rank=1, world_size=2)
    assert not (folder / "contact_sheet.png").exists()  # the other rank has not drawn its samples
    sample(cfg)
    assert Image.open(folder / "contact_sheet.png").size[0] > 300
    (folder / "contact_sheet.png").unlink()
    sample(cfg)  # nothing but the sheet is missing, as after a call that was broken off
    assert Image.open(folder / "contact_sheet.png").size[0] > 300
    report = json.loads((folder / "phases.json").read_text())
    assert report["samples"] == 2 and report["phases"]["diffusion"]["times"] == 1
    assert {"text", "load", "diffusion", "decode", "write"} == report["phases"].keys()
    with av.open(str(folder / "list_0001.mp4")) as container:
        comment = json.loads(container.metadata["comment"])
    assert container.metadata["title"] == comment["prompt"] == "prompt, 1"
    assert (comment["seed"], comment["prompt_index"], comment["text"]) == (42, 1, "prompt, 1. 8 FPS.")


def test_a_refined_prompt_is_drawn_and_the_users_own_kept(tmp_path):
    prompt = Prompt(0, "a cat", "", (), "p", refined="a grey cat sleeps", motion="2")
    cfg = config(tmp_path, motion_score="dynamic")
    request = planning.to_request(planning.Job(prompt, 0, tmp_path / "p.mp4"), cfg, SampleSize(9, 32, 48, "toy"))
    assert request.text == "a grey cat sleeps. 8 FPS. 2 motion score."
    comment = json.loads(planning.tags_of(planning.Job(prompt, 0, tmp_path / "p.mp4"), request, cfg, {})["comment"])
    assert comment["prompt"] == "a cat" and comment["text"] == request.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no prompt"),
        ({"prompt": ["a", " "]}, r"prompt 1 \(from 0\) of 2 is empty"),
        ({"prompt": []}, "no prompt to sample: .* of a list of 0"),
        ({"prompt": "a", "start_index": 3}, "start_index=3, .* of a list of 1"),
        ({"prompt": "a", "ref": "x.png"}, "add --cond_type i2v_head"),
        ({"prompt": "a", "cond_type": "i2v_head"}, "needs a reference"),
        ({"prompt": "a", "cond_type": "i2v_head", "ref": "none.png"}, "ref none.png"),
        ({"prompt": "a", "cond_type": "i2v_head", "ref": "broken.png"}, "ref broken.png"),
        ({"prompt": "a", "cond_type": "i2v_head", "ref": "cut.png"}, "ref cut.png"),
        ({"prompt": "a", "cond_type": "i2v_head", "ref": "cut.mp4"}, "ref cut.mp4"),
        ({"prompt": "a", "cond_type": "i2v_loop", "ref": "grey.png;none.png"}, "ref none.png"),
        ({"prompt": "a", "cond_type": "v2v_head", "ref": "grey.png"}, "does not fit num_frames=9: give 33 or more"),
        (
            {"prompt": "a", "cond_type": "v2v_head", "ref": "grey.png", "sampling_option": {"num_frames": 37}},
            "'grey.png' has 1 frames, cond_type='v2v_head' takes 33",
        ),
        (
            {"prompt": "a", "cond_type": "i2v_head", "ref": "grey.png", "sampling_option": {"num_frames": 1}},
            "num_frames=1",
        ),
        ({"prompt": "a", "cond_type": "i2v_head", "ref": "grey.png", "model": {"type": "flux"}}, "cond_embed=True"),
        ({"prompt": "a", "sampling_option": {"num_frames": 8}}, "num_frames=8 does not fit"),
        ({"prompt": "a", "use_ema": True}, "use_ema=True needs weights"),
        (
            {"prompt": "a", "model": {"type": "flux", "from_pretrained": "outputs/x/epoch*"}},
            r"outputs/x/epoch\*: no such",
        ),
    ],
)
def test_mistakes_are_one_line_before_models_load(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32)).save("grey.png")
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Path("cut.png").write_bytes(noise_png(64))
    write_mp4(Path("whole.mp4"), torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8), 8, crf=10)
    Path("cut.mp4").write_bytes(Path("whole.mp4").read_bytes()[:5000])
    monkeypatch.setattr(Pipeline, "from_config", lambda *_: pytest.fail("models were loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run.sample_all(config(tmp_path, **settings), Place())
    assert "\n" not in str(caught.value)
