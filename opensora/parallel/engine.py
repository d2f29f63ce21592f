"""One model and its optimizer under ColossalAI: forward, backward, update, and the shards that a checkpoint needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opensora.models.lora import LoraStart, load_adapters, plain_name
from opensora.parallel.context import ParallelContext
from opensora.parallel.host import import_colossalai, register_host_accelerator
from opensora.parallel.plugins import boost, make_plugin, zero_stage
from opensora.parallel.shards import ParameterShard
from opensora.parallel.tensor import split_layers


class Engine:
    """A model under one of ColossalAI's plugins.

    Args:
        context: the job.
        model: on the CPU or the device, parameters in `dtype`, whole and equal on all ranks; where `context` has
            tensor-parallel ranks, each keeps its part.
        make_optimizer: a torch optimizer over the trained parameters of the model that it is given; ZeRO puts fp32
            shards in their place.
        plugin: "zero1", "zero2" or "hybrid".
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

        self.context = context
        self.trains_adapters = lora is not None
        self._stage = zero_stage(plugin, plugin_config)
        # kept, since a plugin that nobody has takes its process groups with it
        self._plugin = make_plugin(context, plugin, plugin_config, dtype, grad_clip)
        if lora is not None:
            model = _with_adapters(model, lora, dtype)
        self._splits = split_layers(model, context.tensor)
        wrong = {name: p.dtype for name, p in model.named_parameters() if p.dtype != dtype}
        assert not wrong, f"parameters of another dtype than {dtype}: {wrong}"
        self.module = model
        self.model, self.optimizer = boost(self._plugin, model, make_optimizer(model))

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
            self.optimizer.backward(loss / accumulation_steps)
        return loss.detach()

    def step(self, lr: float, accept: Callable[[float], bool] = lambda norm: True) -> float:
        """Update the weights with the gradients added since the last step.

        Args:
            accept: whether to update with gradients of this norm, answered alike on all ranks. Otherwise weights and
                optimizer state stay as they are, and the gradients are dropped.

        Returns:
            The global L2 norm of the gradients before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._asking_first(accept):
            self.optimizer.step()
        norm = self.optimizer._current_grad_norm
        self.optimizer.zero_grad()
        return float(norm)

    @contextmanager
    def _asking_first(self, accept: Callable[[float], bool]) -> Iterator[None]:
        """Let the torch optimizer update only what `accept` takes: ColossalAI computes the norm and calls it in one."""
        inner = self.optimizer.optim
        update = inner.step
        inner.step = lambda: update() if accept(float(self.optimizer._current_grad_norm)) else None
        try:
            yield
        finally:
            inner.step = update

    def shards(self) -> list[ParameterShard]:
        """This rank's part of every trained parameter, in the model's order."""
        masters = self.optimizer.get_working_to_master_map()
        found = []
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in masters:
                continue
            master, split = masters[id(parameter)], self._splits.get(name)
            start = min(self._zero_rank * master.numel(), parameter.numel())
            stop = min(start + master.numel(), parameter.numel())
            shape = parameter.shape if split is None else split.whole_shape(parameter.shape)
            owned = split is not None or self.context.tensor.rank == 0
            found.append(ParameterShard(plain_name(name), shape, start, stop, master, split, owned))
        return found

    @property
    def _zero_rank(self) -> int:
        """This rank's place among those that divide the optimizer's state of like parts of the model."""
        return self.context.rank // self.context.tensor.size

    def full_parameter(self, name: str) -> torch.Tensor:
        """The whole parameter of that name in `module`. All ranks of a tensor-parallel group call it, in one order."""
        part, split = self.module.get_parameter(name).detach(), self._splits.get(name)
        if split is None:
            return part
        parts = [torch.empty_like(part) for _ in range(split.size)]
        dist.all_gather(parts, part.contiguous(), group=self.context.tensor.process_group)
        return split.join(parts)

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

    def numbers_device(self, shard: ParameterShard) -> torch.device:
        """Where torch's optimizers keep a shard's step: on the host, since they read it in every update, unless their
        kernels do."""
        groups = self.optimizer.optim.param_groups
        by_kernels = any(group.get("fused") or group.get("capturable") for group in groups)
        return shard.master.device if by_kernels else torch.device("cpu")

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


def _with_adapters(model: nn.Module, lora: LoraStart, dtype: torch.dtype) -> nn.Module:
    """The model with peft's adapters in place of its own weights as what is trained."""
    from peft import get_peft_model

    model = get_peft_model(model, lora.config)
    model.to(dtype)  # peft makes adapters in fp32; as all trained weights they get fp32 masters
    if lora.folder is not None:
        load_adapters(model, lora.folder)
    model.peft_config["default"].base_model_name_or_path = lora.base  # peft takes it from models it knows
    return model
