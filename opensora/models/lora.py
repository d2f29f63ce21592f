"""Low-rank adapters in the files of the peft library: made for a model, saved, and merged into its weights.

LoRA (Hu et al. 2021, arXiv:2106.09685): the weight W [out, in] of a linear layer stays as it is, and W + s B A is used,
with A [r, in] and B [out, r] trained. s = alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732).

    lora/adapter_config.json           r, alpha, the layers, and the weights that were adapted
    lora/adapter_model.safetensors     A and B by layer
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from opensora.models.weight_files import WeightSource, open_averages
from opensora.registry import MODELS

FOLDER = "lora"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# What is adapted if the config does not say: the layers into and out of attention, by fused_qkv.
TARGETS = {
    False: ("q_proj", "k_proj", "v_proj", "proj", "v_mlp", "linear2"),
    True: ("qkv", "proj", "linear1", "linear2"),
}

# Settings of a peft config that change what is computed in ways that are not merged here, and the values that do not.
PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False}
PLAIN |= dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"), None)


def plain_name(name: str) -> str:
    """A parameter's name without what peft puts around it: that of the layer, `.lora_A.weight` after it, or of W."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


# ------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class LoraStart:
    """Adapters to train.

    Attributes:
        config: of peft.
        folder: adapters to go on from; None makes new ones.
        base: the weights that they adapt, named in their config for whom they are given to.
    """

    config: Any
    folder: Path | None
    base: str

    @classmethod
    def of(cls, lora: Mapping[str, Any], fused_qkv: bool, base: str, checkpoint: Path | None) -> LoraStart:
        """By a config's `lora_config`, going on from `checkpoint` if there is one (`check_resumable`)."""
        from peft import LoraConfig

        folder = checkpoint and find_adapters(checkpoint)
        arguments = {key: value for key, value in lora.items() if value is not None}
        targets = _read_config(folder)["target_modules"] if folder else targets_of(lora, fused_qkv)
        arguments["target_modules"] = list(targets)
        return cls(LoraConfig(**arguments), folder, base)


def targets_of(lora: Mapping[str, Any], fused_qkv: bool) -> list[str]:
    """The ends of the names of the layers that get new adapters."""
    return list(lora.get("target_modules") or TARGETS[fused_qkv])


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Fill the adapters of a peft model with those of a folder."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))  # by way of the host: peft's own reads to GPU 0


def check_targets(targets: Sequence[str], settings: Mapping[str, Any]) -> None:
    """ValueError for the first target that is the end of no linear layer's name in a model of these settings."""
    shallow = {key: value for key, value in settings.items() if key in MODELS.parameters(settings["type"])}
    shallow |= {"depth": min(1, settings["depth"]), "depth_single_blocks": min(1, settings["depth_single_blocks"])}
    with torch.device("meta"):
        model = MODELS.build({"type": settings["type"], **shallow})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linears):
            known = sorted({re.sub(r"^(double|single)_blocks\.0\.", "", name) for name in linears})
            raise ValueError(
                f"lora_config.target_modules: no linear layer's name ends in '{target}': take of {', '.join(known)}"
            )


def check_resumable(checkpoint: Path, lora: Mapping[str, Any] | None) -> None:
    """ValueError unless a checkpoint holds what the config trains: adapters of its rank and scale, or all weights."""
    folder = find_adapters(checkpoint)
    if lora is None and folder is None:
        return
    if folder is None:
        raise ValueError(
            f"--load {checkpoint} holds whole weights, and lora_config asks for adapters: start from it with "
            f"--model.from_pretrained {checkpoint}, or leave lora_config out"
        )
    if lora is None:
        raise ValueError(
            f"--load {checkpoint} holds adapters: give the lora_config of its run; to train all weights from it, "
            f"--model.from_pretrained {checkpoint}"
        )
    saved = _read_config(folder)
    for key, default in (("r", None), ("lora_alpha", None), ("use_rslora", False)):
        trained = saved.get(key, default)
        if lora.get(key) is not None and lora[key] != trained:
            raise ValueError(f"lora_config.{key}={lora[key]}, but {folder} was trained with {trained}: set it so")
    if lora.get("target_modules") and set(lora["target_modules"]) != set(saved["target_modules"]):
        raise ValueError(
            f"lora_config.target_modules={list(lora['target_modules'])}, but {folder} has "
            f"{sorted(saved['target_modules'])}: set it so"
        )


def adapter_files(model: nn.Module) -> dict[str, bytes]:
    """The adapters of a peft model in files as peft reads them, by name."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        config = (Path(folder) / CONFIG).read_bytes()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {WEIGHTS: save(tensors, metadata={"format": "pt"}), CONFIG: config}


# ------------------------------------------------------------------------------------------------------- merging


def find_adapters(path: Path) -> Path | None:
    """The folder of adapters that a path means: a checkpoint's `lora/`, or itself; None if it has none."""
    return next((folder for folder in (path / FOLDER, path) if (folder / CONFIG).is_file()), None)


def base_of(path: Path) -> Path | None:
    """The weights that the adapters of `path` were trained on, if they are where they were."""
    base = _read_config(find_adapters(path)).get("base_model_name_or_path")
    return Path(base) if base and Path(base).exists() else None


@dataclass(frozen=True)
class Adapters:
    """Adapters of a folder, read.

    Attributes:
        base: the weights they were trained on, as their config names them; None if it does not.
        pairs: (A [r, in], B [out, r]) by the name of the weight they add to.
        scale: s of the formula above.
    """

    base: str | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    @classmethod
    def read(cls, path: Path, use_ema: bool = False, strength: float = 1.0) -> Adapters:
        """The adapters of a checkpoint or a folder of peft's.

        Args:
            use_ema: the averaged ones (a checkpoint's `ema/`). strength: multiplies the scale.

        Raises:
            FileNotFoundError: there are none. ValueError: they are cut short, or of a kind that is not merged here.
        """
        folder = find_adapters(path)
        if folder is None:
            raise FileNotFoundError(f"{path} has no adapters ({CONFIG}): give a checkpoint of a run with lora_config")
        config = _read_config(folder)
        tensors = _averages(path) if use_ema else _read_tensors(folder / WEIGHTS)
        names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
        try:
            pairs = {
                f"{n}.weight": (tensors.pop(f"{n}.lora_A.weight"), tensors.pop(f"{n}.lora_B.weight")) for n in names
            }
        except KeyError as error:
            raise ValueError(f"{folder} lacks {error}: save or download it again") from None
        if tensors:
            raise ValueError(f"{folder} holds more than pairs of lora_A and lora_B ({next(iter(tensors))}): not merged")
        rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        return cls(config.get("base_model_name_or_path"), pairs, strength * config["lora_alpha"] / rank)

    def merged(self, base: WeightSource, where: str) -> WeightSource:
        """`base` with W + s B A in place of W, computed in fp32 and rounded once to W's dtype.

        Raises:
            ValueError: the adapters are not of weights that `base` has.
        """
        for name, (a, b) in self.pairs.items():
            if base.shapes.get(name) != (b.shape[0], a.shape[1]):
                has = f"it is {list(base.shapes[name])}" if name in base.shapes else "there is none"
                raise ValueError(
                    f"{where} adapts {name} [{b.shape[0]}, {a.shape[1]}], in the weights {has}: give the weights that "
                    "it was trained on"
                )

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            return {name: self._merge(name, tensor) for name, tensor in base.read(names).items()}

        return WeightSource(base.shapes, base.dtypes, read, base.metadata)

    def _merge(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.pairs:
            return weight
        a, b = (factor.float() for factor in self.pairs[name])
        return torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype)  # [out, in]


def _averages(checkpoint: Path) -> dict[str, Tensor]:
    source = open_averages(checkpoint)
    return source.read(list(source.shapes))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: save or download the adapters again")
    try:
        return {plain_name(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save or download it again") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """The peft config of adapters that can be merged; ValueError if they are of another kind."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        strange = [key for key, value in PLAIN.items() if (config.get(key) or value) != value]
        missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
        if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
            strange.append("init_lora_weights")  # PiSSA and its like change the base weights too
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is no config of peft's ({error}): save or download it again") from error
    if strange or missing:
        what = f"{strange[0]}={config[strange[0]]!r}" if strange else f"no {missing[0]}"
        raise ValueError(f"{folder / CONFIG} has {what}: only plain LoRA can be used here")
    return config
