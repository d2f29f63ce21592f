import json
from pathlib import Path

import pytest

from opensora.data.aspect import (
    closest_ratio,
    image_size,
    ratio_value,
    resolution_area,
    resolution_sizes,
    size_table,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "aspect.json").read_text())


@pytest.mark.parametrize("key", GOLDEN["tables"])
def test_tables_equal_golden_in_names_order_and_sizes(key):
    multiple, resolution, mode = key.split("/")
    table = resolution_sizes(resolution, int(multiple[1:]), training=mode == "train")
    assert [[name, list(size)] for name, size in table.items()] == [list(x) for x in GOLDEN["tables"][key].items()]


def test_closest_ratio_equals_golden():
    names = list(resolution_sizes("256px", 16))
    for height, width, expected in GOLDEN["closest_ratio_256px"]:
        assert closest_ratio(height, width, names) == expected


def test_ties_go_to_the_first_name():
    assert closest_ratio(100, 100, ["2:1", "1:1.5"]) == "2:1"  # both are 0.5 away


@pytest.mark.parametrize(("name", "area"), [("256px", 65536), ("720p", 1280 * 720), ("1024px_ar1:1", 1024 * 1024)])
def test_area_of_a_resolution(name, area):
    assert resolution_area(name) == area


@pytest.mark.parametrize("name", ["256", "px", "p720", "0px", "256pxp", "-1px", ""])
def test_unknown_resolutions_are_refused(name):
    with pytest.raises(ValueError, match="resolution"):
        resolution_area(name)


def test_suffixes():
    table = resolution_sizes("256px", 16)
    assert resolution_sizes("256px_ar16:9", 16) == {"16:9": table["16:9"]}
    (largest,) = resolution_sizes("256px_max", 16).values()
    assert largest[0] * largest[1] == max(h * w for h, w in table.values())
    for name in ("256px_ar7:5", "256px_min"):
        with pytest.raises(ValueError, match=r"_max.*_ar"):
            resolution_sizes(name, 16)


def test_sizes_are_positive_multiples_near_the_budget():
    for multiple in (8, 16, 32):
        for side in range(2 * multiple, 600, 24):
            for training in (True, False):
                for name, (height, width) in size_table(side * side, multiple, training).items():
                    assert height >= multiple and width >= multiple, name
                    assert height % multiple == 0 and width % multiple == 0
                    assert abs(height * width - side * side) <= multiple * (height + width + multiple)


def test_a_resolution_below_one_multiple_is_refused():
    with pytest.raises(ValueError, match=r"8px.*multiples of 16"):
        resolution_sizes("8px", 16)


def test_image_size_is_the_sampling_table():
    assert image_size("768px", "16:9", 16) == (576, 1024)
    assert image_size("768px", "3:2", 16) == (624, 928)
    with pytest.raises(ValueError, match="aspect_ratio='7:5'"):
        image_size("256px", "7:5", 16)


def test_names_are_width_to_height_and_values_height_over_width():
    assert ratio_value("16:9") == 9 / 16
    for name, (height, width) in resolution_sizes("768px", 16).items():
        assert abs(height / width / ratio_value(name) - 1) < 0.06
