"""Work on items that all ranks of a group hold: each rank computes some, and all get every result.

    items -> an owner for each -> the results of one's own -> shapes and failures of all -> a broadcast by each rank

Ranks of sequence and tensor parallelism see the same batches. What a frozen autoencoder does with them, sample by
sample or tile by tile, is such work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Work = Callable[[Sequence[Tensor]], list[Tensor]]


def share_autoencoder(autoencoder: nn.Module, group: dist.ProcessGroup) -> None:
    """Split the coding of each batch over the ranks of `group`, which from now on have to code it together.

    Latents and pixels are those of a single process, up to the rounding of kernels where that would take more samples
    at once. The noise of a posterior is drawn on each rank, as before.
    """
    if dist.get_world_size(group) > 1:
        autoencoder.map_items = partial(share_work, group)


def share_work(group: dist.ProcessGroup, work: Work, items: Sequence[Tensor]) -> list[Tensor]:
    """`work(items)`, each result computed on one rank of `group` and copied to the others. No gradient comes back.

    Args:
        work: gives the results of any of the items in their order, of one dtype, on the items' device.
        items: the same on all ranks.

    Raises:
        RuntimeError: `work` failed on another rank, or the ranks have items of different shapes.
    """
    here, ranks = dist.get_rank(group), dist.get_world_size(group)
    if ranks == 1 or not items:
        return work(items)
    owners = assign([item.numel() for item in items], ranks)
    own, error = _attempt(work, [item for item, owner in zip(items, owners, strict=True) if owner == here])
    reports = [None] * ranks
    dist.all_gather_object(reports, _Report.of(items, own, error), group=group)
    if error is not None:
        raise error
    _check(reports, group)
    parts = [
        iter(_broadcast(own if rank == here else None, report, rank, items[0].device, group))
        for rank, report in enumerate(reports)
    ]
    return [next(parts[owner]) for owner in owners]


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each item: the costliest first, each to the rank that has least (Graham 1969)."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


class _Report(NamedTuple):
    """What the other ranks have to know of one before they can receive its results.

    given: shapes of all items. failure: why there are no results. made: their shapes. dtype: None of no results.
    """

    given: list[torch.Size]
    failure: str | None
    made: list[torch.Size]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, items: Sequence[Tensor], own: Sequence[Tensor], error: Exception | None) -> _Report:
        failure = None if error is None else f"{type(error).__name__}: {error}"
        dtype = own[0].dtype if own else None
        return cls([item.shape for item in items], failure, [result.shape for result in own], dtype)


def _attempt(work: Work, items: Sequence[Tensor]) -> tuple[list[Tensor], Exception | None]:
    """What a rank fails with, all have to hear: they wait for its results."""
    try:
        results = work(items) if items else []
        assert len(results) == len(items) and len({result.dtype for result in results}) <= 1
        return results, None
    except Exception as error:
        return [], error


def _check(reports: Sequence[_Report], group: dist.ProcessGroup) -> None:
    for rank, report in enumerate(reports):
        name = f"rank {dist.get_global_rank(group, rank)}"
        if report.failure is not None:
            raise RuntimeError(f"{name}, which does a part of this rank's work, failed: {report.failure}")
        if report.given != reports[0].given:
            raise RuntimeError(f"{name} was given other work than the ranks that it shares it with")


def _broadcast(
    own: Sequence[Tensor] | None, report: _Report, rank: int, device: torch.device, group: dist.ProcessGroup
) -> list[Tensor]:
    """The results of the group's `rank`; `own`, if this is it."""
    if not report.made:
        return []
    sizes = [math.prod(shape) for shape in report.made]
    if own is None:
        flat = torch.empty(sum(sizes), dtype=report.dtype, device=device)
    else:
        flat = torch.cat([result.detach().reshape(-1) for result in own])
    dist.broadcast(flat, src=dist.get_global_rank(group, rank), group=group)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), report.made, strict=True)]
