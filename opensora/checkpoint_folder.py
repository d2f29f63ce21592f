"""Names of checkpoint folders, and which one a path means.

outputs/exp/                      run folder
    epoch{E}-global_step{S}/      checkpoint: complete if it has its final name and running_states.json
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from opensora.checkpoint_manifest import summary, weight_problems
from opensora.common import get_logger

_NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
_WEIGHTS = [
    place + pattern
    for pattern in ("*.index.json", "*.safetensors", "*.pt", "*.pth", "*.bin")
    for place in ("model/", "transformer/", "")
]


def folder_name(epoch: int, global_step: int) -> str:
    return f"epoch{epoch}-global_step{global_step}"


def parse_folder_name(path: str | Path) -> tuple[int, int] | None:
    """(epoch, global_step) of a checkpoint folder's path, None for any other path."""
    match = _NAME.fullmatch(Path(path).name)
    return (int(match[1]), int(match[2])) if match else None


def is_complete(path: str | Path) -> bool:
    """Whether `path` is a checkpoint that was written to the end."""
    return parse_folder_name(path) is not None and (Path(path) / "running_states.json").is_file()


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; none where there is no such folder."""
    folder = Path(run_folder)
    return sorted(filter(is_complete, folder.iterdir()), key=_age) if folder.is_dir() else []


def resolve_checkpoint(
    paths: str | Path | Sequence[str | Path], problems_of: Callable[[Path], list[str]] = weight_problems
) -> Path:
    """The checkpoint, or the weights, that the value of a setting means.

    Several paths (the shell expanded a pattern) or a pattern (it did not): the newest checkpoint among them that is
    complete and whole, by global step. A run folder: its newest such one. What is newer and not whole is said in the
    log. One checkpoint, one file or one other folder with weights: itself.

    Args:
        problems_of: what keeps a checkpoint from being used, a line each.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: several paths, none of them a checkpoint folder; a checkpoint, or each of several, is not whole.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [path for entry in given for path in _expand(entry)]
    shown = ", ".join(map(str, given))
    if not found:
        raise FileNotFoundError(
            f"{shown}: no such file or folder; give a checkpoint (outputs/EXP/epoch*-global_step*), a run folder "
            "(outputs/EXP) or a file of weights"
        )
    return _resolve_one(found[0], problems_of) if len(found) == 1 else _newest(found, shown, problems_of)


def _expand(entry: str | Path) -> list[Path]:
    path = Path(entry).expanduser()
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path)))]


def _resolve_one(path: Path, problems_of: Callable[[Path], list[str]]) -> Path:
    has_weights = path.is_file() or any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    if is_complete(path):
        return _newest_whole([path], str(path), problems_of)
    if has_weights:
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        chosen = _newest_whole(checkpoints, str(path), problems_of)
        get_logger().info(f"{path}: taking {chosen.name}, the newest of {len(checkpoints)} checkpoint(s)")
        return chosen
    if parse_folder_name(path):
        raise FileNotFoundError(f"{path} is not a whole checkpoint, it has no running_states.json: use an older one")
    raise FileNotFoundError(f"{path} holds no complete checkpoint (epoch*-global_step*) and no weights")


def _newest(paths: Sequence[Path], shown: str, problems_of: Callable[[Path], list[str]]) -> Path:
    named = [path for path in paths if parse_folder_name(path)]
    if not named:
        raise ValueError(f"{shown}: {len(paths)} paths, none of them a checkpoint (epoch*-global_step*): give one path")
    complete = sorted(filter(is_complete, named), key=_age)
    if not complete:
        raise FileNotFoundError(f"{shown}: none of {len(named)} checkpoints is complete (has running_states.json)")
    skipped = f", {len(named) - len(complete)} incomplete" if len(complete) < len(named) else ""
    chosen = _newest_whole(complete, shown, problems_of)
    get_logger().info(f"taking {chosen}, the newest of {len(named)} checkpoints given{skipped}")
    return chosen


def _newest_whole(checkpoints: Sequence[Path], shown: str, problems_of: Callable[[Path], list[str]]) -> Path:
    """The last that has no problems; ValueError if there is none."""
    for checkpoint in reversed(checkpoints):
        found = problems_of(checkpoint)
        if not found:
            return checkpoint
        if len(checkpoints) == 1:
            raise ValueError(f"{checkpoint} is not whole: {summary(found)}; use another checkpoint")
        get_logger().warning(f"skipping {checkpoint}, which is not whole: {summary(found)}")
    raise ValueError(f"{shown}: none of {len(checkpoints)} checkpoints is whole, the oldest neither: {summary(found)}")


def _age(checkpoint: Path) -> tuple[int, int, float]:
    """Sorts checkpoints oldest first: by global step; of equal ones (of two runs) by when they were written."""
    epoch, global_step = parse_folder_name(checkpoint) or (0, 0)
    return global_step, epoch, (checkpoint / "running_states.json").stat().st_mtime
