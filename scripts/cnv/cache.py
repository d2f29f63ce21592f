"""Encode a table once: latents and text embeddings, from which any number of runs can train.

torchrun --nproc_per_node 8 scripts/cnv/cache.py configs/diffusion/train/stage1.py \
    --dataset.data-path TABLE --output caches/stage1
torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/stage1.py \
    --dataset.data-path TABLE --cached-video caches/stage1 --cached-text caches/stage1
"""

import sys

from opensora.common import one_line_errors, world_size
from opensora.config import load_config
from opensora.training.cache_settings import CacheSettings, validate_cache
from opensora.training.settings import check_paths, require_available, validate


def main(argv: list[str]) -> None:
    cfg = load_config(argv, CacheSettings)
    validate(cfg, world_size())
    validate_cache(cfg)
    require_available(cfg)
    check_paths(cfg)

    # Only a config that can run pays for the distributed libraries.
    from opensora.parallel.context import ParallelContext
    from opensora.training.encode_cache import CacheRun

    with ParallelContext.create(cfg.dist_timeout) as context:
        CacheRun(cfg, context).run()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
