"""Activation memory of the transformer under each setting, and what it costs in time.

python benchmarks/activation_memory.py
python benchmarks/activation_memory.py --hidden-size 3072 --tokens 16384 --text-tokens 512 --depth 4    on a GPU

The model is a config's, with fewer blocks and another width (`--depth` double blocks and twice as many single ones, as
in the 11B model; heads of 128). Measured is what torch's allocator hands out for one micro-batch: weights, gradients
and inputs are there before. On CUDA the allocator's own counters are read, on the CPU every allocation and release is
taken from the profiler.

- bytes per token and block: held between the forward and the backward pass, less what a model without blocks holds.
  The rotary table, which all blocks share, is among them: with few and narrow blocks it shows.
- peak: the most at any time of both passes, recomputation and temporaries included, of the whole model.
- seconds: of both passes, over those without recomputation in the same round; median and range of the rounds. On the
  CPU it is processor time, which other processes disturb less.

Offloaded bytes are in host memory that was allocated before, so they count for neither; on the CPU this is the same
memory, and only the count means something. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.common import to_torch_dtype  # noqa: E402 - the repository need not be installed
from opensora.models.activation import checkpoint_blocks  # noqa: E402
from opensora.models.mmdit import MMDiT  # noqa: E402
from opensora.models.offload import offload_inputs  # noqa: E402
from opensora.models.weights import build_model  # noqa: E402
from opensora.parallel.offload import HostBuffer  # noqa: E402

HEAD = 128  # of the configs: axes_dim 16 + 56 + 56
NOTHING = ((0, 0), "blocks")


# ------------------------------------------------------------------------------------------------ what is measured


def model_of(arguments: argparse.Namespace, depth: int) -> MMDiT:
    settings = dict(Config.fromfile(arguments.config).model)
    sizes = {"hidden_size": arguments.hidden_size, "num_heads": arguments.hidden_size // HEAD}
    settings |= {**sizes, "depth": depth, "depth_single_blocks": 2 * depth, "from_pretrained": None}
    torch.manual_seed(0)
    model = build_model(settings, to_torch_dtype(arguments.dtype), arguments.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as between micro-batches
    return model


def inputs_of(arguments: argparse.Namespace, model: MMDiT) -> dict[str, Tensor]:
    """One sample, as the trainer gives it: `tokens` in all, `text_tokens` of them text."""
    image, text = arguments.tokens - arguments.text_tokens, arguments.text_tokens
    shapes = {
        "img": (1, image, model.in_channels),
        "txt": (1, text, model.txt_in.in_features),
        "y_vec": (1, model.vector_in.in_layer.in_features),
        "timesteps": (1,),
    }
    tensors = {name: torch.rand(shape, dtype=to_torch_dtype(arguments.dtype)) for name, shape in shapes.items()}
    ids = torch.arange(image).float()
    tensors["img_ids"] = torch.stack([ids // 256, ids // 16 % 16, ids % 16], dim=-1)[None]  # frames of 16 x 16 tokens
    tensors["txt_ids"] = torch.zeros(1, text, 3)
    return {name: tensor.to(arguments.device) for name, tensor in tensors.items()}


def settings_of(arguments: argparse.Namespace) -> dict[str, tuple[tuple[int, int] | None, str, bool]]:
    """Name -> grad_ckpt_settings, grad_ckpt_policy, whether inputs are offloaded."""
    half = (arguments.depth // 2, arguments.depth)
    return {
        "none": (*NOTHING, False),
        f"blocks {half}": (half, "blocks", False),
        "attention": (None, "attention", False),
        "full": (None, "full", False),
        "full, offload": (None, "full", True),
    }


def apply(model: MMDiT, setting: tuple[int, int] | None, policy: str, offload: bool, arguments) -> None:
    blocks = checkpoint_blocks(model, setting, policy)
    if offload:
        inputs = len(blocks) * arguments.tokens * arguments.hidden_size * model.img_in.weight.element_size()
        offload_inputs(blocks, HostBuffer(inputs, torch.device(arguments.device)))


# --------------------------------------------------------------------------------------------------- how it is


def allocated_during(work: Callable[[], object], device: str) -> tuple[object, int, int]:
    """What `work` returns, the bytes that it left allocated, and the most at any time meanwhile."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = work()
        return result, torch.cuda.memory_allocated() - start, torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    totals = list(accumulate((event.nbytes() for event in changes), initial=0))  # releases count below zero
    return result, totals[-1], max(totals)


def memory(model: MMDiT, inputs: dict[str, Tensor], device: str) -> tuple[int, int]:
    """(bytes held after the forward pass, most bytes in both passes)."""
    loss, held, forward_peak = allocated_during(lambda: loss_of(model, inputs), device)
    _, _, backward_peak = allocated_during(loss.backward, device)
    return held, max(forward_peak, held + backward_peak)


def loss_of(model: MMDiT, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).float().square().mean()


def seconds(model: MMDiT, inputs: dict[str, Tensor], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    loss_of(model, inputs).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    outside = model_of(arguments, depth=0)
    inputs = inputs_of(arguments, outside)
    seconds(outside, inputs, arguments.device)  # warms up
    without_blocks, _ = memory(outside, inputs, arguments.device)

    model, settings = model_of(arguments, arguments.depth), settings_of(arguments)
    found = {name: {} for name in settings}
    for name, setting in settings.items():
        apply(model, *setting, arguments)
        seconds(model, inputs, arguments.device)
        held, peak = memory(model, inputs, arguments.device)
        per_block = (held - without_blocks) / (arguments.tokens * 3 * arguments.depth)
        found[name] = {"bytes_per_token_and_block": round(per_block, 1), "held_bytes": held, "peak_bytes": peak}

    rounds = []
    for i in range(arguments.repeats):  # another one begins each round
        order = [*settings.items()][i % len(settings) :] + [*settings.items()][: i % len(settings)]
        rounds.append(run_round(model, inputs, dict(order), arguments))
    for name in settings:
        ratios = [taken[name] / taken["none"] for taken in rounds]
        found[name]["seconds_relative"] = round(statistics.median(ratios), 3)
        found[name]["seconds_relative_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        found[name]["seconds"] = round(statistics.median(taken[name] for taken in rounds), 4)
    return found


def run_round(model: MMDiT, inputs: dict[str, Tensor], settings: dict, arguments) -> dict[str, float]:
    """Each setting once: what slows the machine down for a while slows all of them."""
    taken = {}
    for name, setting in settings.items():
        apply(model, *setting, arguments)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        taken[name] = seconds(model, inputs, arguments.device)
    return taken


# ------------------------------------------------------------------------------------------------------- the table


def print_table(found: dict[str, dict]) -> None:
    print(f"{'setting':14} {'bytes/token/block':>18} {'peak MiB':>9} {'time':>6}")
    for name, row in found.items():
        peak = row["peak_bytes"] / 2**20
        print(f"{name:14} {row['bytes_per_token_and_block']:18.0f} {peak:9.1f} {row['seconds_relative']:6.2f}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/diffusion/train/stage1.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--hidden-size", type=int, default=256, help=f"a multiple of {HEAD}")
    parser.add_argument("--tokens", type=int, default=512, help="of image and text")
    parser.add_argument("--text-tokens", type=int, default=128, help="how many of them are text")
    parser.add_argument("--depth", type=int, default=2, help="double blocks; twice as many single ones")
    parser.add_argument("--repeats", type=int, default=9, help="rounds in which times are taken")
    arguments = parser.parse_args(argv)
    if arguments.hidden_size < HEAD or arguments.hidden_size % HEAD:
        parser.error(f"--hidden-size {arguments.hidden_size} is no multiple of {HEAD}")
    if not 0 < arguments.text_tokens < arguments.tokens:
        parser.error(f"--text-tokens {arguments.text_tokens} must be above 0 and below --tokens {arguments.tokens}")
    if min(arguments.depth, arguments.repeats) < 1:
        parser.error("--depth and --repeats must be at least 1")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    gc.disable()  # garbage is not collected at a time of its own choosing
    found = measure(arguments)
    print_table(found)
    sizes = {key: getattr(arguments, key) for key in ("hidden_size", "tokens", "text_tokens", "depth", "dtype")}
    unit = "bytes; seconds of forward and backward over those of `none`"
    result = {"figure": "activation memory", "unit": unit, "repeats": arguments.repeats, **sizes, "settings": found}
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result | describe_machine("torch", "colossalai", device=arguments.device)))


if __name__ == "__main__":
    main(sys.argv[1:])
