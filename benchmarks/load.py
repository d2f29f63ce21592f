"""Loading weights: host memory and seconds for `--model.from_pretrained`, beside what plain PyTorch takes.

python benchmarks/load.py --gb 3
python benchmarks/load.py --gb 3 --layout flux       the file is flux1-dev's layout, the model Open-Sora's
python benchmarks/load.py --gb 3 --format pt
python benchmarks/load.py --gb 2 --layout flux --convert     also scripts/ckpts/convert.py

A bf16 file of an MMDiT with the 11B model's widths and fewer blocks is made in a temporary folder and loaded on the CPU
by fresh processes. Their anonymous memory (RssAnon and RssShmem of /proc/PID/status) is read every 2 ms from outside;
what the interpreter has at first is subtracted. The file is in the system's cache for both sides.

The baseline builds the model in bf16, reads a whole state dict (safetensors' load_file, or torch.load), converts it
where the layouts differ, and copies it with load_state_dict. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.models.mmdit import MMDiT  # noqa: E402 - the repository need not be installed
from opensora.models.mmdit.convert import convert  # noqa: E402
from opensora.models.mmdit.layouts import FLUX, OPEN_SORA  # noqa: E402
from opensora.models.weight_files import SHARD_BYTES, plan_shards, save_shard, write_index  # noqa: E402
from opensora.models.weight_stream import TensorSpec, stream_safetensors  # noqa: E402

WIDTHS = {
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": False,
}
POLL_SECONDS = 0.002


def settings_of(gb: float, layout: str) -> dict:
    """A model whose bf16 weights take about `gb` * 10^9 bytes."""
    square = WIDTHS["hidden_size"] ** 2
    blocks = gb * 1e9 / 2 - 7 * square
    depth = max(1, int(blocks / (36 + 2 * 15) / square))  # two single blocks a double one, as in the 11B model
    single = max(1, round((blocks / square - 36 * depth) / 15))
    form = {"fused_qkv": layout == "flux", "use_liger_rope": layout != "flux"}
    return {**WIDTHS, "depth": depth, "depth_single_blocks": single, **form}


def make_file(folder: Path, settings: dict, kind: str) -> Path:
    """A file of random numbers, the same ones over and over: drawing gigabytes takes longer than what is measured."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MMDiT(**settings).state_dict().items()}
    numbers = torch.randn(2**24).bfloat16()

    def tensor(name: str) -> torch.Tensor:
        count = torch.Size(shapes[name]).numel()
        return numbers.repeat(-(-count // len(numbers)))[:count].reshape(shapes[name]).clone()

    if kind == "pt":
        torch.save({name: tensor(name) for name in shapes}, folder / "model.pt")
        return folder / "model.pt"
    if kind == "shards":
        small = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
        shards = plan_shards(small, SHARD_BYTES // 4)
        for file, names in shards:
            save_shard(folder / file, {name: tensor(name) for name in names})
        write_index(folder, small, shards)
        return folder
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    stream_safetensors(folder / "model.safetensors", specs, tensor, {"format": "pt"})
    return folder / "model.safetensors"


# --------------------------------------------------------------------------------------- in a process of its own


def load_ours(path: Path, settings: dict) -> None:
    from opensora.models.weights import build_model

    build_model({"type": "flux", **settings, "from_pretrained": str(path)}, torch.bfloat16, "cpu")


def load_plainly(path: Path, settings: dict) -> None:
    from safetensors.torch import load_file

    torch.set_default_dtype(torch.bfloat16)
    model = MMDiT(**settings)
    if path.suffix == ".pt":
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if any(".qkv." in name for name in state):
        state = convert(state, FLUX, OPEN_SORA)
    model.load_state_dict(state)


def convert_file(path: Path, settings: dict) -> None:
    from opensora.models.export import ExportOptions, export_weights

    to = "open-sora" if settings["file_layout"] == "flux" else "flux"
    export_weights(str(path), path.parent / "converted.safetensors", ExportOptions(to=to, force=True))


WORK = {"ours": load_ours, "baseline": load_plainly, "convert": convert_file}


def child(work: str, path: Path, settings: dict) -> None:
    import opensora.models.export  # noqa: F401 - what is imported is not what is measured

    torch.zeros(8).bfloat16().sum()
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    WORK[work](path, settings)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


# ------------------------------------------------------------------------------------------------- from outside


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]  # none once it ended
    return sum(int(line.split()[1]) * 1024 for line in lines)


def measure(work: str, path: Path, settings: dict) -> tuple[float, int]:
    """Seconds, and the most bytes of anonymous memory above those of the interpreter."""
    command = [sys.executable, __file__, "--child", work, str(path), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{work} did not start")
        before = peak = anonymous_bytes(process.pid)
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stdout))
        reader.start()
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        reader.join()
    if process.returncode:
        raise RuntimeError(f"{work} failed with exit code {process.returncode}: {''.join(said[-3:])}")
    return json.loads(said[-1])["seconds"], peak - before


def summarise(name: str, runs: list[tuple[float, int]], file_bytes: int) -> dict[str, float | list[float]]:
    seconds = [run[0] for run in runs]
    peak = max(run[1] for run in runs) / file_bytes
    print(f"{name:9} {statistics.median(seconds):6.2f} s  peak {peak:.3f} x the file")
    return {
        "peak_over_file": round(peak, 3),
        "seconds": round(statistics.median(seconds), 2),
        "seconds_range": [round(min(seconds), 2), round(max(seconds), 2)],
    }


def check_room(gb: float, folder: Path, copies: int) -> None:
    disk = shutil.disk_usage(folder).free / 1e9
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    memory = int(available.split()[1]) * 1024 / 1e9
    if disk < copies * gb * 1.2 or memory < 2.5 * gb:
        sys.exit(
            f"error: --gb {gb} needs {copies * gb * 1.2:.0f} GB of disk in {folder} and {2.5 * gb:.0f} GB of memory; "
            f"there are {disk:.0f} and {memory:.0f}"
        )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="size of the file (10^9 bytes)")
    parser.add_argument("--layout", choices=["open-sora", "flux"], default="open-sora", help="of the file")
    parser.add_argument("--format", choices=["safetensors", "shards", "pt"], default="safetensors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--convert", action="store_true", help="measure a conversion into the other layout too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file is made")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    works = ["ours", "baseline", *(["convert"] if arguments.convert else [])]
    check_room(arguments.gb, arguments.folder, copies=1 + arguments.convert)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = make_file(Path(folder), settings_of(arguments.gb, arguments.layout), arguments.format)
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix == ".safetensors"]
        file_bytes = sum(file.stat().st_size for file in files)
        settings = settings_of(arguments.gb, "open-sora")
        found = {}
        for work in works:
            given = {**settings, "file_layout": arguments.layout} if work == "convert" else settings
            measure(work, path, given)  # warms up
            found[work] = summarise(work, [measure(work, path, given) for _ in range(arguments.repeats)], file_bytes)

    result = {"file_gb": round(file_bytes / 1e9, 2), "unit": "anonymous host memory / file size; seconds"}
    result |= {"layout": arguments.layout, "format": arguments.format, "repeats": arguments.repeats, **found["ours"]}
    for work in works[1:]:
        result |= {f"{work}_{key}": value for key, value in found[work].items()}
    result["ratio"] = round(found["baseline"]["seconds"] / found["ours"]["seconds"], 2)
    print(json.dumps(result | describe_machine("torch")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        main(sys.argv[1:])
