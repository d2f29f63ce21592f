import json
from pathlib import Path

import pytest

from opensora.inference.size import Compression, SampleSize, check_num_frames

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())
CAUSAL = Compression(spatial=8, temporal=4, causal=True)


def size(**option):
    return SampleSize.from_config({"num_frames": 9, **option}, CAUSAL, patch_size=2)


def test_table_of_sampling_not_of_training():
    got = size(resolution="256px", aspect_ratio="2.39:1", num_frames=129)
    assert got == SampleSize(129, 160, 384, "256px")  # the training table has 160 x 400
    assert size(resolution="256px", aspect_ratio="9:16") == SampleSize(9, 336, 192, "256px")


@pytest.mark.parametrize("asked", list(GOLDEN["get_noise_shapes"]))
def test_explicit_sizes_are_rounded_up_as_golden_latents(asked):
    height, width, _ = map(int, asked.strip("()").split(","))
    got = size(height=height, width=width, resolution="256px", aspect_ratio="1:1")
    assert [got.height // 8, got.width // 8] == GOLDEN["get_noise_shapes"][asked][-2:]
    assert got.name == f"{width}x{height}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"resolution": "256px", "aspect_ratio": "16:10"}, "16:10"),
        ({"resolution": "huge", "aspect_ratio": "16:9"}, "huge"),
        ({"resolution": "256px"}, "no size"),
        ({"height": 64}, "give both"),
        ({"height": 64, "width": 0}, "positive"),
        ({"num_frames": 8, "resolution": "256px", "aspect_ratio": "1:1"}, "num_frames=8 .* use 5 or 9"),
    ],
)
def test_bad_sizes_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        size(**option)


def test_frames_of_causal_and_uncausal_autoencoders():
    for good in (1, 5, 9, 129):
        check_num_frames(good, 4, causal=True)
    for good in (1, 4, 8, 128):
        check_num_frames(good, 4, causal=False)
    for bad, causal, remedy in (
        (3, True, "use 1 or 5"),
        (3, False, "use 1 or 4"),
        (5, False, "use 4 or 8"),
        (0, True, "use 1"),
    ):
        with pytest.raises(ValueError, match=remedy):
            check_num_frames(bad, 4, causal)
