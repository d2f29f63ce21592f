"""ColossalAI's plugins as they are used here: ZeRO over all ranks, or over those that tensor parallelism leaves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opensora.parallel.context import ParallelContext
from opensora.parallel.host import errors_only, import_colossalai
from opensora.registry import nearest

STAGES = {"zero1": 1, "zero2": 2}
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}

# Of `plugin_config`, what tells how ranks share samples: ours to read (`settings.parallel_sizes`).
LAYOUT = ("tp_size", "sp_size", "pp_size", "enable_sequence_parallelism", "sequence_parallelism_mode")


def zero_plugin_settings() -> set[str]:
    """The keys of `plugin_config` that a ZeRO plugin takes; what the trainer sets itself is left out."""
    import_colossalai()
    from colossalai.booster.plugin import LowLevelZeroPlugin

    ours = {"self", "stage", "precision", "max_norm", "norm_type", "cast_inputs", "master_weights"}
    return set(inspect.signature(LowLevelZeroPlugin.__init__).parameters) - ours


def hybrid_plugin_settings() -> set[str]:
    """The keys of `plugin_config` that a hybrid plugin takes, those of `LAYOUT` among them."""
    import_colossalai()
    from colossalai.booster.plugin import HybridParallelPlugin

    ours = {"self", "precision", "max_norm", "custom_policy"}
    return set(inspect.signature(HybridParallelPlugin.__init__).parameters) - ours | {"reduce_bucket_size_in_m"}


def zero_stage(plugin: str, plugin_config: Mapping[str, Any]) -> int:
    """1 or 2: whether gradients are divided among ranks too. A hybrid's stage 0 is 1 here: the same numbers, with less
    memory."""
    return STAGES.get(plugin) or max(1, plugin_config.get("zero_stage", 1))


def make_plugin(
    context: ParallelContext, name: str, plugin_config: Mapping[str, Any], dtype: torch.dtype, grad_clip: float
):
    """The plugin `name` of `plugin_config`.

    Raises:
        ValueError: the plugin has no such setting.
    """
    known = hybrid_plugin_settings() if name == "hybrid" else zero_plugin_settings()
    for key in plugin_config:
        if key not in known:
            raise ValueError(f"plugin_config.{key} is not a setting of {name}{nearest(key, known)}")
    settings = dict(plugin_config)
    if context.device.type == "cpu":
        settings["overlap_communication"] = False  # there is no second stream to overlap with
    stage, precision, max_norm = zero_stage(name, plugin_config), PRECISIONS[dtype], grad_clip or 0.0
    if name != "hybrid":
        from colossalai.booster.plugin import LowLevelZeroPlugin

        settings = {"master_weights": True, "cast_inputs": False, **settings}
        return LowLevelZeroPlugin(stage=stage, precision=precision, max_norm=max_norm, **settings)
    return _make_hybrid(context, settings, stage, precision, max_norm)


def _make_hybrid(context: ParallelContext, settings: dict[str, Any], stage: int, precision: str, max_norm: float):
    """Ranks that share a sequence are data-parallel ones to ColossalAI: `sequence.py` makes their gradients so."""
    from colossalai.booster.plugin import HybridParallelPlugin

    for key in (*LAYOUT, "zero_stage"):
        settings.pop(key, None)
    if "reduce_bucket_size_in_m" in settings:
        settings["zero_bucket_size_in_m"] = settings.pop("reduce_bucket_size_in_m")
    plugin = HybridParallelPlugin(
        tp_size=context.tensor.size, pp_size=1, zero_stage=stage, precision=precision, max_norm=max_norm, **settings
    )
    for group in (plugin.tp_group, plugin.dp_group, plugin.pp_group, plugin.sp_group, plugin.mixed_dp_group):
        dist.distributed_c10d._set_pg_timeout(context.timeout, group)  # ColossalAI makes them with torch's default
    plugin.precision = {"fp32": "float32"}.get(precision, precision)  # under this name it lets ZeRO have fp32
    return plugin


def boost(plugin, model: nn.Module, optimizer: torch.optim.Optimizer):
    """(model, optimizer) under a plugin."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import HybridParallelPlugin

    with errors_only():
        wrapped = _wrap(plugin, model) if isinstance(plugin, HybridParallelPlugin) else model
        boosted, optimizer, *_ = Booster(plugin=plugin).boost(wrapped, optimizer)
    return boosted, optimizer


def _wrap(plugin, model: nn.Module):
    """The model as a hybrid plugin would wrap it, but for three things: layers are divided already (`tensor.py`), no
    DDP beside ZeRO where there is one data-parallel rank, and inputs keep their types."""
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
    from colossalai.shardformer.policies.base_policy import Policy

    class LeaveAsItIs(Policy):
        def config_sanity_check(self) -> None:
            pass

        def preprocess(self) -> nn.Module:
            return self.model

        def module_policy(self) -> dict:
            return {}

        def postprocess(self) -> nn.Module:
            return self.model

        def get_shared_params(self) -> list:
            return []

    wrapped = HybridParallelModule(
        model,
        precision=plugin.precision,
        shard_config=plugin.shard_config,
        dp_group=plugin.mixed_dp_group,
        tp_group=plugin.tp_group,
        sp_group=plugin.sp_group,
        use_ddp=False,
        ddp_config={},
        custom_policy=LeaveAsItIs(),
        overlap_allgather=plugin.zero_config["overlap_allgather"],
    )
    wrapped.convert_fn = None
    return wrapped
