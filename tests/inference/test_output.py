import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from PIL import Image

from opensora.inference import output
from opensora.inference.metadata import has_tags, sample_tags


def read_mp4(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def smooth_video(frames, height, width):
    """Slow gradients: what 4:2:0 and h264 keep."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([40 + 10 * t, 60 + 2 * y, 200 - 2 * x], dim=-1).to(torch.uint8)


@pytest.mark.parametrize("fps", [24, 23.976, 8.0, 30])
def test_mp4_has_the_frames_the_rate_and_the_prompt(tmp_path, fps):
    video = smooth_video(9, 32, 48)
    path = tmp_path / "new" / "folder" / "a_0000.mp4"
    output.save_sample(path, video, fps, crf=10, prompt="raining, sea")
    stream, frames = read_mp4(path)
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == Fraction(str(fps))
    assert np.stack(frames).shape == (9, 32, 48, 3)
    assert np.abs(np.stack(frames).astype(int) - video.numpy()).mean() < 4
    assert path.with_suffix(".txt").read_text() == "raining, sea\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a_0000.mp4", "a_0000.txt"]


TAGS = {"title": 'raining, "sea"\n雨', "comment": '{"seed": 42, "text": "ü"}'}


def test_an_mp4_keeps_its_tags(tmp_path):
    output.save_sample(tmp_path / "a.mp4", smooth_video(5, 16, 16), 8, 10, "p", TAGS)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert {name: container.metadata[name] for name in TAGS} == TAGS


def test_a_png_keeps_its_tags(tmp_path):
    output.save_sample(tmp_path / "a.png", smooth_video(1, 16, 16), 8, 10, "p", TAGS)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == TAGS
    assert has_tags(tmp_path / "a.png", TAGS)
    assert not has_tags(tmp_path / "a.png", {**TAGS, "title": "another"})
    assert not has_tags(tmp_path / "a.txt", TAGS) and not has_tags(tmp_path / "none.png", TAGS)


def test_tags_hold_what_a_sample_depends_on_and_nothing_else():
    def tags(**settings):
        return sample_tags("a cat", {"seed": 7}, ConfigDict({"dtype": "bf16", "save_dir": "a", **settings}))

    comment = json.loads(tags()["comment"])
    assert tags()["title"] == "a cat"
    assert comment == {"prompt": "a cat", "seed": 7, "config": {"dtype": "bf16"}}
    assert tags(save_dir="b", batch_size=4, plugin="hybrid") == tags() != tags(dtype="fp32")


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path):
    output.write_mp4(tmp_path / "odd.mp4", smooth_video(5, 33, 47), 8, crf=10)
    _, frames = read_mp4(tmp_path / "odd.mp4")
    assert np.stack(frames).shape == (5, 34, 48, 3)


def test_one_frame_is_a_lossless_png(tmp_path):
    image = smooth_video(1, 33, 47)
    output.save_sample(tmp_path / "a.png", image, 24, crf=10, prompt="é")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image[0].numpy())
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é\n"


def test_a_failed_write_leaves_no_sample(tmp_path):
    with pytest.raises(ValueError):  # not a frame rate
        output.save_sample(tmp_path / "a.mp4", smooth_video(5, 16, 16), float("nan"), crf=10, prompt="p")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_pixels_are_rounded_and_clamped():
    video = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    frames = output.to_uint8(video)
    assert frames.shape == (1, 1, 6, 3) and frames.dtype == torch.uint8
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_folder_and_suffix_tell_images_from_videos():
    assert str(output.output_folder("samples", 9, "256px")) == "samples/video_256px"
    assert str(output.output_folder("samples", 1, "256px")) == "samples/image_256px"
    assert (output.sample_suffix(1), output.sample_suffix(5)) == (".png", ".mp4")
