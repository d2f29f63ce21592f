"""Evaluations where something is wrong: files that can't be read, logs that can't be written, memory that runs out."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opensora.common import get_logger
from opensora.data.bucket import BucketTable
from opensora.data.loader import VideoTextDataset
from opensora.data.sampler import BucketSampler
from opensora.parallel.context import ParallelContext
from opensora.parallel.timing import PhaseTimer
from opensora.training.callbacks.base import Callback
from opensora.training.callbacks.evaluation import EvaluationFile, Evaluations, last_evaluated
from opensora.training.evaluation import Evaluation
from opensora.training.held_out import HeldOutLoss, choose_rows
from opensora.training.memory import naming_failures
from opensora.training.step import StepInputs
from opensora.training.whereabouts import Whereabouts

BUCKETS = {"32px": {1: (1.0, 2)}, "64px": {1: (1.0, 2)}}


@pytest.fixture
def said(caplog):
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


@pytest.fixture
def context():
    context = ParallelContext.create(30)
    yield context
    context.close()


@pytest.fixture
def dataset(tmp_path):
    """Ten images of 32 x 32 pixels, and two of 64 x 64."""
    sides = [32] * 10 + [64] * 2
    for i, side in enumerate(sides):
        Image.new("RGB", (side, side), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(12)], "text": "a", "height": sides, "width": sides})
    table = table.assign(num_frames=1, aspect_ratio=1.0, resolution=np.square(sides), fps=0.0)
    table.to_csv(tmp_path / "table.csv", index=False)
    return VideoTextDataset(str(tmp_path / "table.csv"))


def read_by(dataset, context, batches):
    """The rows that a held-out loss of these batches is of."""
    rows = []

    def encode(batch):
        rows.append(batch.index)
        return StepInputs(*(torch.zeros(len(batch)) for _ in range(5)), condition=None)

    HeldOutLoss(dataset, batches, encode, None, [0.5], 0, context, in_worker=False)
    return rows


def test_what_cannot_be_read_is_replaced_or_left_out(dataset, context, tmp_path, said):
    batches = choose_rows(dataset, BucketTable(BUCKETS, None, 16), per_clip=4, seed=0, ranks=1)
    rows = [batch.rows for batch in batches]
    assert [len(batch) for batch in rows] == [2, 2, 2] and rows[2] == [10, 11]
    spare = [row for batch in batches for others in batch.substitutes for row in others]
    assert sorted([*spare, *rows[0], *rows[1]]) == list(range(10))  # each once, and none of another size
    assert read_by(dataset, context, batches) == rows
    for row in (*rows[1], 10, 11):
        (tmp_path / f"{row}.png").write_bytes(b"no image")
    found = read_by(dataset, context, batches)
    assert found[0] == rows[0] and set(found[1]) <= set(spare) and len(set(found[1])) == 2
    assert len(found) == 2 and "evaluation goes without a batch" in said.text
    for row in range(12):
        (tmp_path / f"{row}.png").unlink()
    with pytest.raises(ValueError, match=r"none of the samples of '.*table.csv' .*--eval-samples 0"):
        read_by(dataset, context, batches)


class Full(Callback):
    def on_evaluation(self, trainer, evaluation):
        raise OSError(28, "No space left on device")


class Run:
    """As much of a trainer as an evaluation asks for."""

    def __init__(self, folder, step=4):
        self.run_folder, self.timer = folder, PhaseTimer(torch.device("cpu"), ["eval"])
        self.engine = self.ema = None
        self.state = type("State", (), {"global_step": step})


def test_training_goes_on_where_an_evaluation_cannot_be_logged(tmp_path, said):
    assert last_evaluated(tmp_path) is None
    callback = Evaluations(2, [Full(), EvaluationFile(tmp_path)])
    callback._evaluator = lambda engine, ema, folder, step: Evaluation(step, False, None, [], 1.0)
    callback._evaluate(Run(tmp_path))
    assert "Full goes without the evaluation at step 4: [Errno 28] No space left on device" in said.text
    assert last_evaluated(tmp_path) == 4


def test_out_of_memory_in_an_evaluation(dataset, tmp_path, said):
    sampler = BucketSampler(dataset.table, BucketTable(BUCKETS, None, 16))
    timer = PhaseTimer(torch.device("cpu"), ["eval"])
    place = Whereabouts(0, sampler, timer, 7)
    with pytest.raises(SystemExit), naming_failures(place, tmp_path, True, lambda: None), timer("eval"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()  # it would end this process
    message = said.messages[-1]
    assert "rank 0, update 7, eval. Draw smaller samples (eval_option)" in message and "bucket" not in message
    assert list(tmp_path.glob("*.jsonl")) == []
