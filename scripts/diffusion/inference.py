"""Sample videos or images from a checkpoint. Several ranks share the list of prompts.

python scripts/diffusion/inference.py configs/diffusion/inference/256px.py --prompt "raining, sea" --save-dir samples
torchrun --nproc_per_node 8 scripts/diffusion/inference.py ... --dataset.data-path prompts.csv
"""

import sys

from opensora.common import one_line_errors, world_size
from opensora.config import load_config
from opensora.inference.settings import InferenceSettings, check_paths, require_available, validate


def main(argv: list[str]) -> None:
    cfg = load_config(argv, InferenceSettings)
    validate(cfg, world_size())
    require_available(cfg)
    check_paths(cfg)

    # Only a config that can run pays for the libraries of models and processes.
    from opensora.inference.run import sample_all
    from opensora.parallel.context import ParallelContext
    from opensora.parallel.work import SharedWork

    with ParallelContext.create(cfg.dist_timeout) as context:
        ranks = SharedWork(context)
        sample_all(cfg, context, ranks.on_main)
        ranks.wait()  # for as long as the last one takes: NCCL's groups are taken down by all of their ranks


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
