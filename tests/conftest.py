"""Fixtures for all tests. Being here, it puts this folder on the path: tests import the helpers beside it."""

import pytest
from shapes_world import ShapesWorld


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> ShapesWorld:
    """Made once per session, in about ten seconds."""
    world = ShapesWorld(tmp_path_factory.mktemp("shapes"))
    world.run("scripts/demo/make_shapes.py", "--num", "288")
    world.run("scripts/cnv/meta.py", "--input", "datasets/shapes.csv", "--output", world.table, "--num_workers", "0")
    return world
