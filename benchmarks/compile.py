"""Compiled blocks: seconds for a forward and backward pass with `--compile True`, beside those without.

python benchmarks/compile.py
python benchmarks/compile.py --policy attention
python benchmarks/compile.py --batch 2 --tokens 1024 --model.hidden-size 384 --model.axes-dim [32,32,32]

The model is a config's, by default that of configs/diffusion/train/shapes.py; what this script does not know overrides
the config. Both sides run in this process, in turns, on the CUDA device if there is one; inputs are random. The first
step, which compiles, is timed apart. Other lengths and batch sizes follow, for the number of graphs. The last line is
a JSON object; ratio is seconds without / seconds with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.common import DTYPES  # noqa: E402 - the repository need not be installed
from opensora.config import load_config  # noqa: E402
from opensora.models.activation import POLICIES, checkpoint_blocks  # noqa: E402
from opensora.models.compilation import compile_blocks  # noqa: E402
from opensora.models.weights import build_model  # noqa: E402
from opensora.training.settings import TrainSettings  # noqa: E402

CONFIG = str(ROOT / "configs/diffusion/train/shapes.py")
OTHER_SHAPES = [(3, 24, 12), (1, 40, 12), (5, 100, 12), (2, 64, 20), (1, 33, 7), (8, 16, 12)]


def inputs_for(
    model: nn.Module, batch: int, tokens: int, text: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    positions = torch.arange(tokens, device=device)
    ids = torch.stack([positions // 16, positions // 4 % 4, positions % 4], dim=-1).float()  # [L, 3]
    return {
        "img": normal(batch, tokens, model.in_channels),
        "img_ids": ids.expand(batch, -1, -1),
        "txt": normal(batch, text, model.txt_in.in_features),
        "txt_ids": torch.zeros(batch, text, 3, device=device),
        "timesteps": torch.rand(batch, device=device).to(dtype),
        "y_vec": normal(batch, model.vector_in.in_layer.in_features),
        "cond": normal(batch, tokens, model.in_channels + model.patch_size**2) if model.cond_embed else None,
        "guidance": torch.full((batch,), 4.0, dtype=dtype, device=device) if model.guidance_embed else None,
    }


def step_seconds(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    model.zero_grad()
    start = time.perf_counter()
    model(**inputs).float().square().mean().backward()
    if inputs["img"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build(arguments: argparse.Namespace, settings: dict, compiled: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model({**settings, "from_pretrained": None}, DTYPES[arguments.dtype], device).train()
    if arguments.policy != "none":
        checkpoint_blocks(model, None, arguments.policy)
    if compiled:
        compile_blocks(model)
    return model


def count_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of the image or video; 48: 9 frames of 64 x 64")
    parser.add_argument("--text", type=int, default=12, help="tokens")
    parser.add_argument("--policy", choices=["none", *POLICIES], default="none", help="of recomputation")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    arguments, overrides = parse_arguments(argv)
    unread = ["--dataset.data-path", "none.csv"]
    settings = load_config([arguments.config, *unread, *overrides], TrainSettings).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager, compiled = (build(arguments, settings, on, device) for on in (False, True))
    shape = (arguments.batch, arguments.tokens, arguments.text)
    inputs = inputs_for(eager, *shape, DTYPES[arguments.dtype], device)

    compile_seconds = step_seconds(compiled, inputs)
    for model in (eager, compiled, eager, compiled):  # warms up
        step_seconds(model, inputs)
    pairs = [(step_seconds(eager, inputs), step_seconds(compiled, inputs)) for _ in range(arguments.repeats)]
    graphs = count_graphs()
    for other in OTHER_SHAPES:
        step_seconds(compiled, inputs_for(compiled, *other, DTYPES[arguments.dtype], device))

    result = {"unit": "seconds for a forward and backward pass", "shape": shape, "policy": arguments.policy}
    result |= {"parameters": sum(p.numel() for p in eager.parameters()), "dtype": arguments.dtype}
    for name, seconds in zip(("eager", "compiled"), zip(*pairs, strict=True), strict=True):
        result[name] = round(statistics.median(seconds), 5)
        result[f"{name}_range"] = [round(min(seconds), 5), round(max(seconds), 5)]
        print(f"{name:9} {result[name]:8.5f} s")
    result |= {"ratio": round(result["eager"] / result["compiled"], 3), "compile_seconds": round(compile_seconds, 1)}
    result |= {"repeats": arguments.repeats, "graphs": graphs, "graphs_after_7_shapes": count_graphs()}
    print(json.dumps(result | {"threads": torch.get_num_threads()} | describe_machine("torch", device=device)))


if __name__ == "__main__":
    main(sys.argv[1:])
