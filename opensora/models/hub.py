"""Weights on the Hugging Face hub: a file of a repository, or a folder of one with an index and its shards.

The hub's own settings hold: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN. What is in its cache needs no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora.common import rank
from opensora.models.weight_files import INDEX_SUFFIX, choose_weights, shards_of
from opensora.settings import WEIGHT_FILES

REASON_LENGTH = 300


def download_weights(name: str) -> Path:
    """The file that `name` means, downloaded if it is not in the hub's cache; nothing else of the repository is.

    Args:
        name: "owner/repository/file"; or "owner/repository", "owner/repository/folder": its index, beside its shards,
            or its only file of weights.

    Raises:
        FileNotFoundError: neither the hub nor its cache gives it. ValueError: several files could be meant.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, repository, *inner = name.split("/")
    repository = f"{owner}/{repository}"
    with _one_line(name), _one_bar():
        if inner and inner[-1].endswith((*WEIGHT_FILES, INDEX_SUFFIX)):
            chosen = "/".join(inner)
        else:
            folder = "".join(f"{part}/" for part in inner if part)
            files = [file[len(folder) :] for file in _files(repository) if file.startswith(folder)]
            chosen = folder + choose_weights(files, name)
        path = Path(hf_hub_download(repository, chosen))
        if chosen.endswith(INDEX_SUFFIX):
            place = chosen.rpartition("/")[0]
            shards = sorted(set(shards_of(path).values()))
            snapshot_download(repository, allow_patterns=[f"{place}/{shard}" if place else shard for shard in shards])
    return path


def _files(repository: str) -> list[str]:
    """The files of a repository as the hub lists them; those in the cache if it can't be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository)
    except Exception:  # the hub's errors have no base class in common over its versions
        cached = _cached_files(repository)
        if not cached:
            raise
        return cached


def _cached_files(repository: str) -> list[str]:
    """The files of a repository's main branch that were downloaded before."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        return []
    snapshots = [
        r for repo in cached if (repo.repo_id, repo.repo_type) == (repository, "model") for r in repo.revisions
    ]
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for snapshot in snapshots
        if "main" in snapshot.refs
        for file in snapshot.files
    ]


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """The hub's errors, which take several lines, as one. Our own pass."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (ValueError, FileNotFoundError)) and reason.startswith(name):
            raise
        reason = reason if len(reason) <= REASON_LENGTH else reason[:REASON_LENGTH] + " ..."
        raise FileNotFoundError(
            f"{name}: no such file or folder here, and the Hugging Face hub did not give it ({reason}): correct the "
            "path, or download it first (ckpts/README.md)"
        ) from error


@contextmanager
def _one_bar() -> Iterator[None]:
    """The hub shows its progress once, not once a rank."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = rank() != 0 and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()
