import json
import math
from pathlib import Path

import numpy as np
import pytest

from opensora.data.captions import caption
from opensora.data.frame_rate import map_target_fps, sampling_intervals

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = json.loads((GOLDEN / "text.json").read_text())
RATES = json.loads((GOLDEN / "map_target_fps.json").read_text())


@pytest.mark.parametrize("setting", TEXTS)
def test_suffixes_equal_golden(setting):
    vmaf = "vmaf=True" in setting
    for fps, score, expected, interval, _ in TEXTS[setting]:
        rate = math.nan if fps is None else fps
        for unknown in (None, math.nan):
            assert caption("A cat.", rate, unknown if score is None else score, 24, vmaf) == expected
        assert map_target_fps(rate, 24)[1] == interval


def test_target_rates_equal_golden():
    for fps, fps_max, new_fps, interval in RATES["rows"]:
        assert map_target_fps(fps, fps_max) == (new_fps, interval)
        assert str(map_target_fps(fps, fps_max)[0]) == str(new_fps)  # "24" and "24.0" make different captions
    assert list(map_target_fps(math.nan, 24)) == RATES["nan"]


def test_intervals_of_a_column_equal_those_of_its_rows():
    fps = np.concatenate([np.random.default_rng(0).uniform(0.1, 500, 5000), np.arange(1, 241), [math.nan]])
    for fps_max in (1, 16, 23.976, 24, 30, None):
        expected = [map_target_fps(float(rate), fps_max)[1] for rate in fps]
        assert sampling_intervals(fps, fps_max).tolist() == expected


def test_without_a_limit_no_rate_is_told():
    assert caption("A cat.", 30.0, 3.4, None, vmaf=True) == "A cat. 3 motion score."
    assert caption("A cat.", 30.0, 3.4, None, vmaf=False) == "A cat."
