"""Show what a config makes of a table before it is trained on: samples, steps and tokens by bucket, and the clips.

python scripts/cnv/buckets.py configs/diffusion/train/stage1.py --dataset.data-path TABLE --world-size 8 --preview 16
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from opensora.common import one_line_errors
from opensora.config import load_config
from opensora.data.bucket import BucketTable
from opensora.data.preview import write_preview
from opensora.data.report import epoch_report, render, write_csv
from opensora.data.report_figure import draw_report
from opensora.data.sampler import BucketSampler
from opensora.inference.output import save_sample, to_uint8
from opensora.registry import DATASETS
from opensora.schema import setting
from opensora.settings import SIZES, check_at_least
from opensora.training.settings import TrainSettings, validate

PREVIEW_CRF = 8  # of the mp4 files: hardly any loss


@dataclass(kw_only=True)
class BucketsSettings(TrainSettings):
    """All settings of a training run, and what is made of them here."""

    world_size: int | None = setting(None, "GPUs of the run; None: as few as the plugin's groups need")
    preview: int = setting(0, "samples to write, the first ones of the first epoch")
    output: str | None = setting(None, "folder of what is written; None: buckets-TABLE in `outputs`")


def main(argv: list[str]) -> None:
    cfg = load_config(argv, BucketsSettings)
    check_at_least(cfg, {"world_size": 1, "preview": 0})
    sharing = math.prod(cfg.plugin_config.get(key, 1) for key in SIZES)  # ranks that work on the same samples
    world_size = cfg.world_size or sharing
    validate(cfg, world_size)
    dataset = DATASETS.build(cfg.dataset, where="dataset")
    buckets = BucketTable(cfg.bucket_config, dataset.fps_max, cfg.ae_spatial_compression)

    def sampler(ranks: int, accumulation_steps: int) -> BucketSampler:
        layout = {"data_parallel_size": ranks, "accumulation_steps": accumulation_steps}
        return BucketSampler(dataset.table, buckets, seed=cfg.seed, epochs=1, **layout)

    ranks = world_size // sharing
    report = epoch_report(sampler(ranks, cfg.accumulation_steps))
    name = Path(cfg.dataset.data_path).stem
    folder = Path(cfg.output or Path(cfg.outputs) / f"buckets-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    print(render(report), flush=True)
    write_csv(report, folder / "buckets.csv")
    draw_report(report, folder / "buckets.png", f"{name}, {Path(argv[0]).stem}")
    print(f"written to {folder}: buckets.csv (every bucket), buckets.png")
    if cfg.preview:
        # One rank with as many micro-batches in an update sees what all ranks see, in their order.
        everything = sampler(1, ranks * cfg.accumulation_steps)
        written = write_preview(dataset, buckets, everything, cfg.preview, folder / "preview", save_preview, to_uint8)
        print(f"written to {folder / 'preview'}: {written} samples, samples.csv, samples.png")


def save_preview(path, frames, fps, text):
    save_sample(path, frames, fps, PREVIEW_CRF, text)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
