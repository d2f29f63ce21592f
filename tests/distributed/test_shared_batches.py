"""What the rank that reads tells the others when it cannot go on."""

import pytest

from opensora.parallel import shared_batches


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("others_are_there", [True, False])
def test_whatever_ends_the_reading_ends_the_others(monkeypatch, stop, others_are_there):
    def batches():
        raise stop
        yield

    def tell(group, value):
        told.append(value)
        if not others_are_there:
            raise RuntimeError("connection closed by peer")

    told = []
    monkeypatch.setattr(shared_batches, "_tell", tell)
    monkeypatch.setattr(shared_batches.dist, "get_rank", lambda: 0)
    with pytest.raises(stop):
        next(shared_batches.send_batches(batches(), group=None))
    (value,) = told
    assert isinstance(value, BaseException)
