"""How evenly a step's work is spread over ranks: the sampler's order against drawing each rank's bucket at random.

python benchmarks/balance.py
python benchmarks/balance.py --rows 100000
python benchmarks/balance.py --data-path TABLE.csv

All ranks of a step wait for the slowest. The figure is the mean of their work over the maximum, over an epoch: the
share of time that is not spent waiting. Ranks are data-parallel ranks (stage2 has 4 GPUs in each), with one micro-batch
a step.

- Work is counted, not timed: floating-point operations of the 11B transformer for a micro-batch. Per token its linear
  layers take 24 h^2 a block and attention 4 * tokens * h (h = 3072), so batch * tokens * (1 + tokens / 18432), tokens
  being those of the clip and 512 of text. The frozen encoders are left out.
- "random order" is Open-Sora 2.0's: of each bucket the micro-batches that are full, all of them in one random
  permutation, of which rank r of n takes the r-th, (n+r)-th, ...
- Both have the same table, buckets and micro-batches. "cost by step" and "by last step" are rank correlations of a
  step's cost with its number and with the step before: a shuffled epoch has none (1 / sqrt(steps) is chance).

The table is made up, with a fixed seed: a fifth images, videos of seven sizes from 360p to 4K, 16 % of them portrait or
square, at the usual frame rates, their length log-normal about 4 s as after cutting into scenes. How bad the random
order is depends on the mix: on images beside long clips above all.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opensora.common import get_logger, one_line_errors  # noqa: E402 - the repository need not be installed
from opensora.config import load_config  # noqa: E402
from opensora.data.bucket import BucketTable  # noqa: E402
from opensora.data.plan import balance  # noqa: E402
from opensora.data.records import Table  # noqa: E402
from opensora.data.sampler import BucketSampler  # noqa: E402
from opensora.training.settings import TrainSettings  # noqa: E402

SEED = 42
CONFIGS = ("stage1", "stage2")
RANKS = (8, 64, 512)
# (height, width): share of the videos, of the images
SIZES = {
    (1080, 1920): (0.36, 0.1),
    (720, 1280): (0.3, 0.1),
    (360, 640): (0.08, 0.1),
    (2160, 3840): (0.1, 0.05),
    (1920, 1080): (0.07, 0.1),
    (1280, 720): (0.05, 0.05),
    (1080, 1080): (0.04, 0.1),
    (1024, 1024): (0.0, 0.2),
    (800, 1200): (0.0, 0.15),
    (512, 512): (0.0, 0.05),
}
RATES = {23.976: 0.15, 24.0: 0.1, 25.0: 0.25, 29.97: 0.2, 30.0: 0.2, 50.0: 0.05, 60.0: 0.05}
IMAGES, SECONDS, SPREAD = 0.2, 4.0, 0.6  # share of rows; median and sigma of the log-normal lengths


class MadeUpTable:
    """The numbers of a table, without a file."""

    file = "made-up table"

    def __init__(self, rows: int):
        draw = np.random.default_rng(SEED)
        image = draw.random(rows) < IMAGES
        of_video, of_image = (draw.choice(len(SIZES), rows, p=share) for share in zip(*SIZES.values(), strict=True))
        self.height, self.width = np.array(list(SIZES), dtype=np.int32)[np.where(image, of_image, of_video)].T
        fps = draw.choice(list(RATES), rows, p=list(RATES.values()))
        frames = np.exp(draw.normal(np.log(SECONDS), SPREAD, rows)) * fps
        self.num_frames = np.where(image, 1, np.maximum(frames, 2)).astype(np.int32)
        self.fps = np.where(image, np.nan, fps)

    def __len__(self) -> int:
        return len(self.num_frames)


def random_order(sampler: BucketSampler, ranks: int) -> np.ndarray:
    """Cost of each rank's micro-batch at each step if buckets are drawn at random: [steps, ranks]."""
    batch_sizes = np.array([bucket.batch_size for bucket in sampler.buckets.buckets])
    costs = np.repeat(sampler.costs(), sampler.sizes(0) // batch_sizes)
    costs = np.random.default_rng(SEED).permutation(costs)
    return costs[: len(costs) // ranks * ranks].reshape(-1, ranks)


def our_order(sampler: BucketSampler, ranks: int) -> np.ndarray:
    """The same in the sampler's order: [steps, ranks]."""
    return sampler.costs()[sampler.plan(0).bucket].reshape(-1, ranks)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - counts / 2)[where]

    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


def simulate(name: str, table: Table | MadeUpTable) -> dict[int, list[float]]:
    config = str(ROOT / f"configs/diffusion/train/{name}.py")
    cfg = load_config([config, "--seed", str(SEED), "--dataset.data-path", str(table.file)], TrainSettings)
    buckets = BucketTable(cfg.bucket_config, cfg.dataset.fps_max, cfg.ae_spatial_compression)
    found = {}
    for ranks in RANKS:
        sampler = BucketSampler(table, buckets, seed=cfg.seed, data_parallel_size=ranks)
        ours, at_random = our_order(sampler, ranks), random_order(sampler, ranks)
        found[ranks] = [round(balance(at_random), 4), round(balance(ours), 4)]
        step_costs = ours.mean(axis=1)
        by_step = rank_correlation(step_costs, np.arange(len(ours)))
        by_last = rank_correlation(step_costs[1:], step_costs[:-1])
        print(
            f"{name:8} {ranks:5} {len(ours):8,} {found[ranks][0]:13.4f} {found[ranks][1]:8.4f} {by_step:12.3f} "
            f"{by_last:12.3f} {len(ours) ** -0.5:8.3f}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the made-up table (default: 1 million)")
    parser.add_argument("--data-path", metavar="TABLE", help="a table of your own instead")
    arguments = parser.parse_args()
    get_logger().setLevel("ERROR")  # which buckets are empty is not the point here
    start = time.perf_counter()
    table = Table(arguments.data_path) if arguments.data_path else MadeUpTable(arguments.rows)
    print(f"{len(table):,} rows of {arguments.data_path or f'a made-up table, seed {SEED}'}")
    print("config   ranks    steps  random order     ours cost by step by last step   chance")
    found = {name: simulate(name, table) for name in CONFIGS}
    print(f"{time.perf_counter() - start:.1f} s, Python {platform.python_version()}, numpy {np.__version__}")
    print(json.dumps(found))


if __name__ == "__main__":
    with one_line_errors():
        main()
