"""Train a video diffusion transformer.

torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py --dataset.data-path TABLE
"""

import faulthandler
import sys

from opensora.common import one_line_errors, world_size
from opensora.config import load_config
from opensora.training.settings import TrainSettings, check_paths, require_available, validate


def main(argv: list[str]) -> None:
    cfg = load_config(argv, TrainSettings)
    validate(cfg, world_size())
    require_available(cfg)
    check_paths(cfg)

    # Only a config that can run pays for the distributed libraries.
    from opensora.parallel.context import ParallelContext
    from opensora.training.trainer import Trainer

    # The watchdog, which says where a rank waits, is to be before the collectives, which do not.
    with ParallelContext.create(cfg.dist_timeout + 60) as context:
        # Stacks on stderr tell where a start hangs; from the first update on the watchdog does.
        faulthandler.dump_traceback_later(cfg.dist_timeout)
        try:
            Trainer(cfg, context).run()
        except KeyboardInterrupt:
            print("interrupted: nothing was saved after the last checkpoint", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
