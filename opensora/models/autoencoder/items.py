"""The independent pieces of an autoencoder's work, samples and tiles of samples: its items, each [1, C, ...].

An autoencoder hands all of a batch's items to its `map_items`. Who computes them is not the autoencoder's business:
`parallel/sharing.py` replaces `compute_all` where processes hold the same batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Work = Callable[[Sequence[Tensor]], list[Tensor]]  # the results of items, in their order
MapItems = Callable[[Work, Sequence[Tensor]], list[Tensor]]


def compute_all(work: Work, items: Sequence[Tensor]) -> list[Tensor]:
    """The plain `map_items`: all of them here."""
    return work(items)


def in_micro_batches(
    network: Callable[[Tensor], Tensor], at_once: Callable[[torch.Size], int], items: Sequence[Tensor]
) -> list[Tensor]:
    """`network` of each item, in their order; items of one shape go through it together.

    Samples of a batch don't see each other, so a result is that of the item alone, up to the rounding of the kernels
    that another size of batch selects.

    Args:
        at_once: at_once(shape) is how many items of a shape make a batch; at least 1.
    """
    of_shape = defaultdict(list)
    for index, item in enumerate(items):
        of_shape[item.shape].append(index)
    results = {}
    for shape, indices in of_shape.items():
        step = at_once(shape)
        for part in (indices[start : start + step] for start in range(0, len(indices), step)):
            batch = network(torch.cat([items[index] for index in part]))  # [len(part), C', ...]
            results |= {index: batch[place : place + 1] for place, index in enumerate(part)}
    return [results[index] for index in range(len(items))]
