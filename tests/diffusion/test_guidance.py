import json
from pathlib import Path

import pytest
import torch

from opensora.diffusion import guidance
from opensora.diffusion.guidance import FULL, NEITHER, NO_TEXT

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())


def test_oscillation_equals_golden():
    assert [guidance.oscillate(7.5, i) for i in range(16)] == GOLDEN["oscillation"]["g7.5"]
    assert [guidance.oscillate(3.0, i, start=3) for i in range(8)] == GOLDEN["oscillation"]["force3"]


def test_temporal_scale_rises_along_time_and_fades_over_the_steps():
    first, third = guidance.temporal_scale(3.0, 0, 4, 5), guidance.temporal_scale(3.0, 2, 4, 5)
    assert first.tolist() == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert third.tolist() == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0])
    assert guidance.temporal_scale(3.0, 0, 4, 1).tolist() == [1.0]


@pytest.mark.parametrize("text_scale", [1.0, 7.5])
@pytest.mark.parametrize("image_scale", [1.0, 3.0])
@pytest.mark.parametrize("has_reference", [True, False])
def test_needed_branches_give_the_three_branch_result(text_scale, image_scale, has_reference):
    full, no_text, neither = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    if not has_reference:  # without a reference the two are one computation
        neither = no_text
    expected = neither + image_scale * (no_text - neither) + text_scale * (full - no_text)
    known = {FULL: full, NO_TEXT: no_text, NEITHER: neither}
    needed = guidance.needed_branches(text_scale, image_scale, has_reference)
    got = guidance.combine({branch: known[branch] for branch in needed}, text_scale, image_scale)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert len(needed) == (3 if has_reference and image_scale != 1 else 1 + (text_scale != 1))
