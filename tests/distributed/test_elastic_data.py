"""A run that goes on in another layout trains on exactly the samples that it has not seen."""

import os

from opensora.config import load_config
from opensora.training.callbacks import Callback
from opensora.training.settings import TrainSettings
from opensora.training.trainer import Trainer


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_batch(self, trainer, batch) -> None:
        self.rows += batch.index


def rows_of_run(context, root, arguments) -> list[int]:
    os.chdir(root)
    trainer = Trainer(load_config(arguments, TrainSettings), context)
    trainer.callbacks.append(rows := Rows())
    trainer.run()
    return rows.rows


def test_other_ranks_and_batch_sizes_go_on_with_what_is_left_of_the_epoch(one_rank, two_ranks, shapes, tmp_path):
    common = ["--outputs", str(tmp_path), "--num-workers", "0", "--epochs", "1", "--ckpt-every", "0"]
    first = shapes.train_arguments(*common, "--exp-name", "two", "--max-steps", "20")
    rows = [row for rank in two_ranks(rows_of_run, shapes.root, first) for row in rank]
    assert len(rows) == len(set(rows)) < 288
    other = ["--bucket-config", "{'64px': {1: (1.0, 6), 5: (1.0, 3), 9: (1.0, 2)}}", "--load", str(tmp_path / "two")]
    (rest,) = one_rank(rows_of_run, shapes.root, shapes.train_arguments(*common, "--exp-name", "one", *other))
    assert not set(rows) & set(rest)
    assert sorted(rows + rest) == list(range(288))
