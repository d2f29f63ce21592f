"""One model and its optimizer under ColossalAI: forward, backward, update, and the shards that a checkpoint needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from opensora.models.lora import LoraStart, load_adapters, plain_name
from opensora.parallel.context import ParallelContext
from opensora.parallel.host import errors_only, import_colossalai, register_host_accelerator
from opensora.parallel.shards import ParameterShard
from opensora.registry import nearest

ZERO_STAGES = {"zero1": 1, "zero2": 2}
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def zero_plugin_settings() -> set[str]:
    """The keys of `plugin_config` that a ZeRO plugin takes; what the trainer sets itself is left out."""
    import_colossalai()
    from colossalai.booster.plugin import LowLevelZeroPlugin

    ours = {"self", "stage", "precision", "max_norm", "norm_type", "cast_inputs", "master_weights"}
    return set(inspect.signature(LowLevelZeroPlugin.__init__).parameters) - ours


class Engine:
    """A model boosted by ColossalAI's ZeRO-1 or ZeRO-2.

    Args:
        context: the job.
        model: on the CPU or the device, parameters in `dtype`, equal on all ranks.
        make_optimizer: a torch optimizer over the trained parameters of the model that it is given; ZeRO puts fp32
            shards in their place.
        plugin: "zero1" or "zero2".
        plugin_config: the plugin's own settings (`reduce_bucket_size_in_m`, `overlap_allgather`, ...).
        dtype: bfloat16 (with fp32 master weights) or float32.
        grad_clip: the largest global gradient norm; 0 does not clip.
        lora: adapters that are trained in place of the model's own weights; None trains these.

    Attributes:
        module: the model, wrapped by peft if adapters are trained. model: the same under the plugin.
        trains_adapters: whether they are.
    """

    def __init__(
        self,
        context: ParallelContext,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        plugin: str,
        plugin_config: Mapping[str, Any],
        dtype: torch.dtype,
        grad_clip: float,
        lora: LoraStart | None = None,
    ):
        import_colossalai()
        register_host_accelerator()
        from colossalai.booster import Booster

        self.context = context
        self.trains_adapters = lora is not None
        self._stage = ZERO_STAGES[plugin]
        self._booster = Booster(plugin=self._zero_plugin(plugin_config, dtype, grad_clip))
        if lora is not None:
            with errors_only():  # it warns of learning rates
                model = self._booster.enable_lora(model, lora_config=lora.config)
            model.to(dtype)  # peft makes adapters in fp32; as all trained weights they get fp32 masters
            if lora.folder is not None:
                load_adapters(model, lora.folder)
            model.peft_config["default"].base_model_name_or_path = lora.base  # peft takes it from models it knows
        wrong = {name: p.dtype for name, p in model.named_parameters() if p.dtype != dtype}
        assert not wrong, f"parameters of another dtype than {dtype}: {wrong}"
        self.module = model
        self.model, self.optimizer, *_ = self._booster.boost(model, make_optimizer(model))

    def _zero_plugin(self, plugin_config: Mapping[str, Any], dtype: torch.dtype, grad_clip: float):
        from colossalai.booster.plugin import LowLevelZeroPlugin

        known = zero_plugin_settings()
        for key in plugin_config:
            if key not in known:
                raise ValueError(f"plugin_config.{key} is not a setting of zero{self._stage}{nearest(key, known)}")
        settings = {"master_weights": True, "cast_inputs": False, **plugin_config}
        if self.context.device.type == "cpu":
            settings["overlap_communication"] = False  # there is no second stream to overlap with
        return LowLevelZeroPlugin(stage=self._stage, precision=PRECISIONS[dtype], max_norm=grad_clip or 0.0, **settings)

    def forward_backward(
        self, loss_of: Callable[[nn.Module], torch.Tensor], micro_step: int = 0, accumulation_steps: int = 1
    ) -> torch.Tensor:
        """Add one micro-batch's gradients, of loss / accumulation_steps, averaged over data-parallel ranks.

        Args:
            loss_of: the scalar loss of the boosted model that it is given.

        Returns:
            The micro-batch's loss on this rank, detached.
        """
        # ZeRO-2 keeps only its shard of the gradients, so it reduces every micro-batch; ZeRO-1 can wait for the last.
        wait = self._stage == 1 and micro_step < accumulation_steps - 1
        loss = loss_of(self.model)
        with self.optimizer.no_sync() if wait else nullcontext():
            self._booster.backward(loss / accumulation_steps, self.optimizer)
        return loss.detach()

    def step(self, lr: float) -> float:
        """Update the weights with the gradients added since the last step.

        Returns:
            The global L2 norm of the gradients before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        norm = self.optimizer._current_grad_norm
        self.optimizer.zero_grad()
        return float(norm)

    def shards(self) -> list[ParameterShard]:
        """This rank's part of every trained parameter, in the model's order."""
        masters = self.optimizer.get_working_to_master_map()
        found = []
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in masters:
                continue
            master = masters[id(parameter)]
            start = min(self.context.data_parallel_rank * master.numel(), parameter.numel())
            stop = min(start + master.numel(), parameter.numel())
            found.append(ParameterShard(plain_name(name), parameter.shape, start, stop, master))
        return found

    def optimizer_state(self, shard: ParameterShard) -> dict[str, Any]:
        """The optimizer's state of one shard ("exp_avg", "step", ...); the dict itself, to read or to fill."""
        return self.optimizer.optim.state[shard.master]

    def make_optimizer_state(self, shard: ParameterShard) -> None:
        """Let a bitsandbytes optimizer make its state of a shard: in paged memory, if it is such a one. torch's make
        theirs in the first step."""
        inner = self.optimizer.optim
        if not hasattr(inner, "init_state"):
            return
        for group_index, group in enumerate(inner.param_groups):
            for index, master in enumerate(group["params"]):
                if master is shard.master:
                    inner.init_state(group, master, group_index, index)

    def restore_optimizer_state(self, shard: ParameterShard, saved: Mapping[str, Any]) -> None:
        """Fill the state of a bitsandbytes optimizer (`make_optimizer_state`).

        Raises:
            ValueError: `saved` is of other sizes or types than the optimizer's own.
        """
        state = self.optimizer_state(shard)
        for key, value in saved.items():
            if not torch.is_tensor(value):
                state[key] = value
            elif (state[key].shape, state[key].dtype) == (value.shape, value.dtype):
                state[key].copy_(value)
            else:
                raise ValueError(
                    f"the saved optimizer state {key} of {shard.name} is {list(value.shape)} {value.dtype}, with optim "
                    f"as it is now {list(state[key].shape)} {state[key].dtype}: set optim as in the checkpoint's "
                    "config.txt"
                )

    @property
    def optimizer_name(self) -> str:
        return type(self.optimizer.optim).__name__

    def wait_for_weights(self) -> None:
        """Return when the weights of the last step have arrived (`overlap_allgather` gathers them behind it)."""
        self.model._force_wait_all_gather()
