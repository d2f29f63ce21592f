"""Clips of 33 frames at their bucket's size: CPU seconds beside decoding the whole file, and beside the decoder alone.

python benchmarks/decode.py
python benchmarks/decode.py --windows 20 --clips 10000    # also memory over 10,000 clips

The files are h264 as x264 writes it by default (B-frames, a keyframe every 250 frames), 300 frames of a moving, grainy
picture. Windows are spread evenly over the file. For each, in turns and in this process:

ours        `read_clip`, as a training worker calls it (uint8);
exact       `read_clip(resize="exact")`;
whole       as the reference does: decode every frame to RGB into one array, copy it to a tensor, take the window, scale
            it by `interpolate`, crop, normalise;
floor       PyAV seeks to the keyframe and decodes to the window's end; nothing is converted;
floor_skip  the same without the pictures before the window that no other picture needs.

The last line is a JSON object: ratio is whole / ours, floor is ours / floor, ratio_at_floor is whole / floor: what a
reader that does nothing but decode would reach; worker_mb is what a process holds at most above what it held before.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose names are those of others' modules

from benchmarks.machine import describe_machine  # noqa: E402
from opensora.data.aspect import image_size  # noqa: E402 - the repository need not be installed
from opensora.data.transforms import centre_crop, cover_size, normalise  # noqa: E402
from opensora.data.video import read_clip, window_indices  # noqa: E402

FRAMES, CLIP, GROUP = 300, 33, 250
SIZES = {"360p": (360, 640), "720p": (720, 1280)}


def draw_video(height: int, width: int, num_frames: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3]: textures of several scales that drift at different speeds, and grain."""
    draw = np.random.default_rng(0)
    layers = []
    for scale in (4, 16, 64):
        small = draw.random((1, 3, height // scale + 2, 2 * width // scale), dtype=np.float32)
        layers.append(interpolate(torch.from_numpy(small), size=(height, 2 * width), mode="bicubic")[0].numpy())
    grain = draw.normal(0, 0.02, (8, 1, height, width)).astype(np.float32)
    for number in range(num_frames):
        picture = sum(np.roll(layer, -number * (i + 1), axis=2)[:, :, :width] for i, layer in enumerate(layers)) / 3
        yield ((picture + grain[number % 8]).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def write_video(path: Path, height: int, width: int, num_frames: int = FRAMES) -> Path:
    with av.open(str(path), "w") as file:
        options = {"preset": "veryfast", "crf": "26", "x264-params": f"keyint={GROUP}:min-keyint={GROUP}:scenecut=0"}
        stream = file.add_stream("libx264", rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in draw_video(height, width, num_frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        file.mux(stream.encode())
    return path


def decode_whole(path: Path, indices: np.ndarray, height: int, width: int) -> Tensor:
    """float32 [3, T, H, W] in [-1, 1]."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_count = 1  # fewest CPU seconds
        frames = np.zeros((stream.frames, stream.height, stream.width, 3), dtype=np.uint8)
        for number, frame in enumerate(file.decode(stream)):
            frames[number] = frame.to_rgb().to_ndarray()
    video = torch.from_numpy(frames).clone().permute(0, 3, 1, 2)
    window = video[torch.from_numpy(indices)].float().div_(255)
    cover = cover_size(*window.shape[2:], height, width)
    scaled = interpolate(window, size=cover, mode="bilinear", align_corners=False)
    rows, columns = centre_crop(*cover, height, width)
    return scaled[..., rows, columns].sub(0.5).div(0.5).transpose(0, 1)


def decode_only(path: Path, indices: np.ndarray, skip: bool) -> int:
    """Frames decoded from the keyframe to the window's end."""
    keyframe, count = int(indices[0]) // GROUP * GROUP, 0
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_count = 1
        tick = int(1 / (stream.average_rate * stream.time_base))
        if keyframe:
            file.seek(keyframe * tick, stream=stream)
        first, last = (int(indices[i]) * tick + (stream.start_time or 0) for i in (0, -1))
        for packet in file.demux(stream):
            before = packet.pts is not None and packet.pts < first
            stream.codec_context.skip_frame = "NONREF" if skip and before else "DEFAULT"
            for frame in packet.decode():
                count += 1
                if frame.pts >= last:
                    return count
    return count


def cpu_seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def compare(path: Path, height: int, width: int, windows: int) -> dict[str, float]:
    """Mean CPU seconds of a clip by each way."""
    seconds: dict[str, list[float]] = {}
    for turn in range(-1, windows):  # the first warms up
        indices = window_indices(FRAMES, CLIP, 1, (max(0, turn) + 0.5) / windows)
        ways = {
            "ours": lambda w=indices: read_clip(path, w, height, width),
            "exact": lambda w=indices: read_clip(path, w, height, width, resize="exact"),
            "floor": lambda w=indices: decode_only(path, w, skip=False),
            "floor_skip": lambda w=indices: decode_only(path, w, skip=True),
            "whole": lambda w=indices: decode_whole(path, w, height, width),
        }
        for name, way in ways.items():
            taken = cpu_seconds(way)
            if turn >= 0:
                seconds.setdefault(name, []).append(taken)
    exact, whole = (read_clip(path, indices, height, width, "exact"), decode_whole(path, indices, height, width))
    if not torch.equal(exact, whole):
        raise SystemExit("the exact clip differs from that of the whole file")
    fast = normalise(read_clip(path, indices, height, width), torch.float32)
    print(f"  mean difference of a fast pixel: {127.5 * (fast - whole).abs().mean():.2f} of 255")
    return {name: float(np.mean(values)) for name, values in seconds.items()}


def peak_memory(whole: bool, path: Path, height: int, width: int, clips: int) -> list[float]:
    """MiB that this process holds at most above what it held before: in the first and the second half of the clips."""
    torch.set_num_threads(1)
    read = decode_whole if whole else read_clip
    peaks, before = [], memory("VmRSS")
    for half in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        for i in range(half * clips // 2, (half + 1) * clips // 2):
            read(path, window_indices(FRAMES, CLIP, 1, (i * 0.618) % 1), height, width)
        peaks.append(memory("VmHWM") - before)
    return peaks


def memory(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def in_fresh_process(function: Callable, *arguments: object) -> object:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="clips of each file")
    parser.add_argument("--clips", type=int, default=0, help="clips of a small file to read for memory's growth")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in SIZES.items():
            path = write_video(Path(folder) / f"{name}.mp4", height, width)
            print(f"{name}: {path.stat().st_size * 8 * 24 / FRAMES / 1e6:.1f} Mbit/s")
            target = image_size("256px", "16:9", 16, training=True)
            seconds = compare(path, *target, arguments.windows)
            print("  ms of CPU: " + ", ".join(f"{way} {1000 * value:.0f}" for way, value in seconds.items()))
            figures |= {
                f"ratio_{name}": round(seconds["whole"] / seconds["ours"], 2),
                f"ratio_at_floor_{name}": round(seconds["whole"] / seconds["floor"], 2),
                f"ratio_exact_{name}": round(seconds["whole"] / seconds["exact"], 2),
                f"floor_{name}": round(seconds["ours"] / seconds["floor"], 2),
                f"floor_skip_{name}": round(seconds["ours"] / seconds["floor_skip"], 2),
                f"worker_mb_{name}": round(max(in_fresh_process(peak_memory, False, path, *target, 8))),
                f"worker_mb_whole_{name}": round(max(in_fresh_process(peak_memory, True, path, *target, 2))),
            }
        if arguments.clips:
            small = write_video(Path(folder) / "small.mp4", 64, 64)
            halves = in_fresh_process(peak_memory, False, small, 32, 32, arguments.clips)
            figures |= {"clips": arguments.clips, "worker_mb_halves": [round(peak, 1) for peak in halves]}
    print(json.dumps(figures | {"windows": arguments.windows} | describe_machine("torch", "av")))


if __name__ == "__main__":
    main()
