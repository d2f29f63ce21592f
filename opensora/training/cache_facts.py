"""What a cache was made with and for, and whether that is still what a run needs.

Two kinds of facts: what entries depend on ("made_with": they are of no use if it changes), and which entries there are
("covers": more can be added).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora.common import to_torch_dtype
from opensora.data.bucket import BucketTable
from opensora.data.cache import Cache, Key, text_key
from opensora.data.loader import VideoTextDataset
from opensora.data.records import Table
from opensora.diffusion.conditions import spans_of
from opensora.fingerprint import sample_hash
from opensora.registry import AUTOENCODERS, DATASETS, TEXT_ENCODERS, Registry

VIDEO, TEXT = "video", "text"  # folders of a cache
# Settings of the encoders that change how fast they are, not what they give.
_SPEED = ("micro_batch_pixels", "compile", "shardformer")
_MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".txt")
_ROWS_TRIED = 256
_LONGEST_VALUE = 80  # characters of a fact in a message

Facts = dict[str, Any]


class Caches(NamedTuple):
    video: Cache | None
    text: Cache | None


def open_caches(cfg: Mapping[str, Any]) -> Caches:
    """The caches that `cached_video` and `cached_text` name; FileNotFoundError if one is not there or not complete."""
    folders = {VIDEO: cfg["cached_video"], TEXT: cfg["cached_text"]}
    return Caches(*(folder and Cache(Path(folder) / kind, f"cached_{kind}") for kind, folder in folders.items()))


def check_caches(cfg: Mapping[str, Any], caches: Caches, dataset: VideoTextDataset, buckets: BucketTable) -> None:
    """ValueError if a cache is stale: it names what changed. For the seed there is `check_seed`.

    Reads parts of the encoders' weights and looks some rows of the table up; each of the others when it is its turn.
    """
    facts = ((caches.video, lambda: video_facts(cfg, dataset.table)), (caches.text, lambda: text_facts(cfg)))
    for cache, made_with in facts:
        if cache is not None:
            _check_made_with(cache, made_with())
            _check_coverage(cache, coverage(cfg, dataset.table))
    seeds = [cache.description["covers"].get("seed", cfg["seed"]) for cache in caches if cache is not None]
    tried = list(_rows_to_try(dataset.table, buckets, seeds[0])) if seeds else []
    if caches.video is not None:
        keys = ((row, dataset.windows.window(row, size, 0).key) for row, size in tried)
        _check_rows(caches.video, keys, "path, num_frames or fps")
    if caches.text is not None:
        _check_rows(caches.text, ((row, text_key(dataset.caption(row))) for row, _ in tried), "text, fps or score")


def check_seed(caches: Caches, seed: int) -> None:
    """ValueError if buckets are drawn with another seed than those of a cache.

    seed: the sampler's, when it is where the run starts: a checkpoint may have brought its own.
    """
    for cache in caches:
        if cache is not None and (cached := cache.description["covers"].get("seed", seed)) != seed:
            raise ValueError(
                f"{_stale(cache)} has the clips that are drawn with seed {cached}, but this run draws with {seed} (of "
                f"--seed, or of the checkpoint that it goes on from): run scripts/cnv/cache.py with --seed {seed} and "
                f"--output {cache.folder.parent}: it adds what is new"
            )


def video_facts(cfg: Mapping[str, Any], table: Table) -> Facts:
    """What entries of videos depend on, beside the videos. Relative paths mean other files elsewhere."""
    causal = AUTOENCODERS.get(cfg["ae"]["type"]).is_causal
    lengths = {frames for by_frames in cfg["bucket_config"].values() for frames in by_frames}
    spans = {span.name for frames in lengths for span in spans_of(cfg["condition_config"], frames, causal)}
    dataset = _settings(DATASETS, cfg["dataset"], "dataset")
    return _plain(
        _component(AUTOENCODERS, cfg["ae"], "ae")
        | {name: dataset[name] for name in ("dataset.transform_name", "dataset.resize", "dataset.fps_max")}
        | {"dtype": str(to_torch_dtype(cfg["dtype"])), "frames given by condition_config": sorted(spans)}
        | {"the folder of relative paths": table.origin}
    )


def text_facts(cfg: Mapping[str, Any]) -> Facts:
    """What entries of captions depend on, beside the text in the table."""
    dataset = _settings(DATASETS, cfg["dataset"], "dataset")
    return _plain(
        _component(TEXT_ENCODERS, cfg["t5"], "t5")
        | _component(TEXT_ENCODERS, cfg["clip"], "clip")
        | {name: dataset[name] for name in ("dataset.fps_max", "dataset.vmaf")}
        | {"dtype": str(to_torch_dtype(cfg["dtype"]))}
    )


def coverage(cfg: Mapping[str, Any], table: Table) -> Facts:
    """Which rows there are entries of, in which clips. Where buckets are drawn, for the epochs of one seed."""
    rules = {
        resolution: {frames: probability for frames, (probability, _) in by_frames.items()}
        for resolution, by_frames in cfg["bucket_config"].items()
    }
    drawn = {"seed": cfg["seed"], "epochs": cfg["epochs"]} if is_drawn(cfg["bucket_config"]) else {}
    return _plain(
        {"ae_spatial_compression": cfg["ae_spatial_compression"], "dataset.data_path": f"table {table.fingerprint}"}
        | {"bucket_config, batch sizes aside,": rules}
        | drawn
    )


def is_drawn(bucket_config: Mapping[str, Mapping[int, Any]]) -> bool:
    """Whether rows change their bucket from epoch to epoch."""
    odds = [np.atleast_1d(probability) for by_frames in bucket_config.values() for probability, _ in by_frames.values()]
    return any(((each > 0) & (each < 1)).any() for each in odds)


def require_same(where: str, old: Facts, new: Facts, remedy: str) -> None:
    """ValueError that names the first fact in which they differ."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(f"{where} has {name} {_short(old.get(name))}, this run has {_short(new[name])}: {remedy}")


def _check_made_with(cache: Cache, needed: Facts) -> None:
    old, spans = dict(cache.description["made_with"]), "frames given by condition_config"
    if spans in needed and set(needed[spans]) <= set(old[spans]):  # more than are needed do no harm
        old[spans] = needed[spans]
    remedy = f"make another with scripts/cnv/cache.py and another --output, or do without --{cache.flag}"
    require_same(_stale(cache), old, needed, remedy)


def _check_coverage(cache: Cache, needed: Facts) -> None:
    old = dict(cache.description["covers"])
    if "seed" in needed and "seed" in old:
        old["seed"] = needed["seed"]
    if "epochs" in needed and old.get("epochs", 0) >= needed["epochs"]:
        old["epochs"] = needed["epochs"]
    require_same(_stale(cache), old, needed, _extend(cache))


def _check_rows(cache: Cache, keys: Iterable[tuple[int, Key]], columns: str) -> None:
    for row, key in keys:
        if key not in cache:
            raise ValueError(f"{_stale(cache)} has not what row {row} has as {columns} now: {_extend(cache)}")


def _stale(cache: Cache) -> str:
    return f"{cache.setting}='{cache.folder.parent}' is stale: it"


def _extend(cache: Cache) -> str:
    return f"run scripts/cnv/cache.py with --output {cache.folder.parent} again: it adds what is new"


def _rows_to_try(table: Table, buckets: BucketTable, seed: int) -> Iterable[tuple[int, tuple[int, int, int]]]:
    """Rows all over the table with the size of the clip that they have in the first epoch."""
    rows = np.unique(np.linspace(0, len(table) - 1, _ROWS_TRIED).astype(np.int64))
    columns = (np.asarray(column)[rows] for column in (table.num_frames, table.height, table.width, table.fps))
    seeds = rows.astype(np.uint64) * np.uint64(len(buckets)) + np.uint64(seed)
    for row, bucket in zip(rows.tolist(), buckets.assign_seeded(*columns, seeds).ids.tolist(), strict=True):
        if bucket >= 0:
            found = buckets.buckets[bucket]
            yield row, (found.num_frames, found.height, found.width)


def _component(registry: Registry, settings: Mapping[str, Any], where: str) -> Facts:
    """An encoder's settings and a hash of its weights, wherever they lie."""
    facts = {name: value for name, value in _settings(registry, settings, where).items() if not name.endswith(_SPEED)}
    weights = facts.pop(f"{where}.from_pretrained", None)
    return facts | {f"{where}.from_pretrained": None if weights is None else f"weights {weights_fingerprint(weights)}"}


def _settings(registry: Registry, settings: Mapping[str, Any], where: str) -> Facts:
    """A component's settings by dotted name, defaults included."""
    defaults = {name: parameter.default for name, parameter in registry.parameters(settings["type"]).items()}
    return {f"{where}.{name}": value for name, value in (defaults | dict(settings)).items()}


def weights_fingerprint(path: str) -> str:
    """A hash of the names, the sizes and parts of the contents of the files of a model, not of when they were written.

    A name on the Hugging Face hub stands for itself.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return path
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.suffix in _MODEL_FILES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(place) if place.is_dir() else ''}/{sample_hash(file)}".encode())
    return digest.hexdigest()[:16]


def _plain(facts: Facts) -> Facts:
    """As JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(facts))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
