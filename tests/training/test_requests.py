import os
import signal
from types import SimpleNamespace

import pytest
import torch

from opensora.training.callbacks import Requests
from opensora.training.checkpoint import Checkpointer
from opensora.training.trainer import Trainer

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Saving(Checkpointer):
    """One whose save takes as long as a test says."""

    saving = False


@pytest.fixture
def trainer():
    checkpointer = Saving(SimpleNamespace(device=torch.device("cpu")), engine=None, ema=None)
    return SimpleNamespace(checkpointer=checkpointer, total_updates=9)


@pytest.fixture
def requests(tmp_path):
    requests = Requests()
    requests.look_for_files(tmp_path)
    yield requests
    requests.close()


def update(requests: Requests, trainer) -> tuple[bool, bool]:
    asked = requests.take()
    requests.agree(*map(float, asked))
    requests.on_update(trainer, SimpleNamespace(step=1))
    return asked


def test_signals_are_collected_before_the_start(requests, trainer):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):  # there is nothing to save
        os.kill(os.getpid(), signal.SIGINT)
    requests.on_start(trainer)
    os.kill(os.getpid(), signal.SIGINT)
    assert requests.take() == (True, True)
    assert requests.take() == (False, False)


def test_handlers_are_put_back_where_a_trainer_cannot_be_built():
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(TypeError):
        Trainer(None, None)
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_file_stays_until_its_save_is_published_and_asks_once(requests, trainer, tmp_path):
    (tmp_path / "save").touch()
    trainer.checkpointer.saving = True
    assert update(requests, trainer) == (True, False)
    assert update(requests, trainer) == (False, False) and (tmp_path / "save").exists()
    trainer.checkpointer.saving = False
    assert update(requests, trainer) == (False, False) and not (tmp_path / "save").exists()
    (tmp_path / "save").touch()
    assert update(requests, trainer) == (True, False) and not (tmp_path / "save").exists()


def test_no_file_outlives_the_run(requests, trainer, tmp_path):
    """Not even one that came too late to be looked at: it would stop the next run."""
    (tmp_path / "stop").touch()
    requests.on_end(trainer)
    assert list(tmp_path.iterdir()) == []
