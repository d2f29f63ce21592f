"""Fixtures for all tests. Being here, it puts this folder on the path: tests import the helpers beside it."""

import signal

import pytest
from shapes_world import ShapesWorld


def pytest_configure():
    """Ctrl-C is to reach what tests start, also where pytest runs in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> ShapesWorld:
    """Made once per session, in about ten seconds."""
    world = ShapesWorld(tmp_path_factory.mktemp("shapes"))
    world.run("scripts/demo/make_shapes.py", "--num", "288")
    world.run("scripts/cnv/meta.py", "--input", "datasets/shapes.csv", "--output", world.table, "--num_workers", "0")
    return world
