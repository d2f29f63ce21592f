"""train.py that also writes down which samples each rank trains on, and fills its disk when it is told to."""

import json
import os
import resource
import sys

from opensora.common import one_line_errors, world_size
from opensora.config import load_config
from opensora.parallel.context import ParallelContext
from opensora.training.callbacks import Callback
from opensora.training.settings import TrainSettings, check_paths, require_available, validate
from opensora.training.trainer import Trainer

FULL_DISK = "fill-the-disk"


class Record(Callback):
    """A line in `samples-rank{N}.jsonl` per micro-batch: process, update and rows."""

    def __init__(self, run_folder, rank: int):
        self._file = open(run_folder / f"samples-rank{rank}.jsonl", "a", buffering=1)  # noqa: SIM115 - held for the run

    def on_batch(self, trainer, batch) -> None:
        line = {"process": os.getpid(), "update": trainer.whereabouts.update, "rows": batch.index}
        self._file.write(json.dumps(line) + "\n")


class FullDisk(Callback):
    """A limit on the size of files stands in for a full disk of one rank, once, when the driver leaves a file."""

    def on_update(self, trainer, metrics) -> None:
        flag = trainer.run_folder / f"{FULL_DISK}{trainer.context.rank}"
        if flag.exists():
            flag.unlink()
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))


class RecordedTrainer(Trainer):
    def _build_callbacks(self):
        return [Record(self.run_folder, self.context.rank), FullDisk(), *super()._build_callbacks()]


def main(argv: list[str]) -> None:
    cfg = load_config(argv, TrainSettings)
    cfg.async_io = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) % 2 == 1  # saves of both kinds are to be killed
    validate(cfg, world_size())
    require_available(cfg)
    check_paths(cfg)
    context = ParallelContext.create(cfg.dist_timeout)
    try:
        RecordedTrainer(cfg, context).run()
    finally:
        context.close()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
