"""The host CPU as a ColossalAI accelerator, so that its ZeRO plugins run over gloo as they do over NCCL.

ColossalAI 0.5.0 ships a `CpuAccelerator` whose stream and synchronisation calls raise, and its ZeRO optimizer asserts
on the accelerator's name. Everything that differs on a CPU is mended here, once, before a Booster is built.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def import_colossalai() -> None:
    """Import ColossalAI's booster (6 s) without the warnings of what it could use and does not need (apex)
    and of names that torch is about to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import colossalai.booster.plugin  # noqa: F401
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*is deprecated", category=FutureWarning)


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep ColossalAI's hints to itself."""
    logger = logging.getLogger("colossalai")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def register_host_accelerator() -> None:
    """Make the CPU ColossalAI's accelerator where there is no CUDA device; does nothing where there is one."""
    if torch.cuda.is_available():
        return
    from colossalai.accelerator import get_accelerator, set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    if getattr(get_accelerator(), "is_host", False):
        return

    class HostAccelerator(CpuAccelerator):
        """A synchronous device: there is one stream of work, and it is always finished."""

        is_host = True

        def synchronize(self, device=None) -> None:
            return None

        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def Stream(self, device=None, priority=0, **kwargs):
            return None

        def current_stream(self, device=None):
            return None

        def stream(self, stream_):
            return nullcontext()

        def get_rng_state(self, device=None) -> torch.Tensor:
            return torch.get_rng_state()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

    set_accelerator(HostAccelerator())
    # Its other check, that all parameters share one dtype, is made by Engine.
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
