"""Write a model's weights in another layout, as one file or as a folder of shards; export a checkpoint to a file.

python scripts/ckpts/convert.py ckpts/flux1-dev.safetensors ckpts/flux1-dev-fused-rope.safetensors --to open-sora
python scripts/ckpts/convert.py outputs/EXP exp.safetensors --to open-sora --ema --dtype bf16
"""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from opensora.checkpoint_folder import resolve_checkpoint
from opensora.common import DTYPES, one_line_errors
from opensora.models.export import ExportOptions, export_weights
from opensora.models.mmdit.layouts import LAYOUTS

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """ "4GB" -> 4 * 10**9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.upper())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size: give one like 4GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="what --model.from_pretrained takes: file, folder, run, hub name")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a .safetensors file, or a folder for shards and an index"
    )
    parser.add_argument("--to", required=True, choices=["open-sora", "flux", "diffusers"], help="the layout of OUT")
    parser.add_argument("--from", dest="layout", choices=LAYOUTS, help="the layout of IN (default: by its names)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: that of IN")
    parser.add_argument(
        "--ema", action="store_true", help="the averaged weights of a checkpoint, in fp32 unless --dtype"
    )
    parser.add_argument("--lora", help="adapters to merge into IN: a checkpoint of a run with lora_config, or peft's")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how strongly (1)")
    parser.add_argument("--max-shard-size", type=parse_size, default="4GB", help="of the files of a folder (4GB)")
    parser.add_argument(
        "--axes-dim", type=int, nargs=3, metavar="N", help="for diffusers: the model's axes_dim, if no run tells it"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    options = ExportOptions(
        to=arguments.to,
        source=arguments.layout,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        ema=arguments.ema,
        max_shard_bytes=arguments.max_shard_size,
        axes_dim=arguments.axes_dim and tuple(arguments.axes_dim),
        force=arguments.force,
        lora=arguments.lora and resolve_checkpoint(arguments.lora),
        lora_scale=arguments.lora_scale,
    )
    export_weights(arguments.source, arguments.out, options)


def interruptible(run: Callable[[], None]) -> None:
    """`run`, which a SIGINT or SIGTERM ends by an exit, on which what is half written is removed.

    torch's code may answer what a handler raises within it with an error of its own: what was received counts.
    """
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        run()
    except BaseException:
        if not received:
            raise
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(128 + received[0])


if __name__ == "__main__":
    with one_line_errors():
        interruptible(lambda: main(sys.argv[1:]))
