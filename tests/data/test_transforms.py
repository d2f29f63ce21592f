import numpy as np
import pytest
import torch

from opensora.data.transforms import centre_crop, cover_size, normalise

SIZES = [(360, 640), (640, 360), (1080, 1920), (48, 64), (1, 1), (7, 1000), (255, 255), (719, 1281)]
TARGETS = [(256, 256), (192, 336), (336, 192), (48, 64), (16, 16), (1024, 576)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_the_cover_is_the_smallest_picture_of_the_same_shape_around_the_target(size, target):
    cover = cover_size(*size, *target)
    assert cover[0] >= target[0] and cover[1] >= target[1]
    assert cover[0] == target[0] or cover[1] == target[1]
    scale = max(target[0] / size[0], target[1] / size[1])
    assert abs(cover[0] - size[0] * scale) <= 0.5 and abs(cover[1] - size[1] * scale) <= 0.5


def test_a_picture_of_the_targets_size_is_not_scaled():
    assert cover_size(192, 336, 192, 336) == (192, 336)


@pytest.mark.parametrize(("margin", "before"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_the_crop_is_centred(margin, before):
    rows, columns = centre_crop(100 + margin, 50 + margin, 100, 50)
    assert (rows, columns) == (slice(before, before + 100), slice(before, before + 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalise_is_exact_before_it_is_rounded_to_the_dtype(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy((np.arange(256) / 255 - 0.5) / 0.5)
    got = normalise(values, dtype)
    assert got.dtype == dtype and got.min() == -1 and got.max() == 1
    torch.testing.assert_close(got.double(), expected.to(dtype).double(), rtol=0, atol=torch.finfo(dtype).eps)
    assert values.dtype == torch.uint8 and values[255] == 255  # the input is left alone


def test_normalise_leaves_normalised_clips_as_they_are():
    clip = torch.tensor([-1.0, 0.25, 1.0])
    assert torch.equal(normalise(clip, torch.float32), clip)
    assert normalise(clip, torch.bfloat16).dtype == torch.bfloat16
