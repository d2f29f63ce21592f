"""Make all that the demo trains on: videos of moving shapes, text encoders and an autoencoder, in about 20 seconds.

    python scripts/demo/make_shapes.py [--num 1920] [--seed 0] [--root .]

    datasets/shapes/00000.mp4 ...   clips of 9 and of 5 frames at 12 fps, and still images (.png), 64 x 64
    datasets/shapes.csv             path, text ("a red circle moving left"; an image: "a red circle")
    datasets/shapes_prompts.csv     text: the 48 prompts
    ckpts/shapes/t5, clip           tiny text encoders with tokenizers, in the hub's layout
    ckpts/shapes/ae.safetensors     a linear causal autoencoder, fitted to the clips

The same arguments give the same files. What is complete is left as it is.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import render
import text_encoders
from PIL import Image

SIZE = 64
# Frames of the files, a block of 48 prompts at a time: seven blocks of long clips, one of short ones, two of images.
BLOCKS = (9, 9, 1, 9, 9, 5, 9, 9, 1, 9)
FIT_CLIPS = 384  # of the autoencoder


def main() -> None:
    arguments = parse_arguments()
    root = Path(arguments.root)
    table = root / "datasets/shapes.csv"
    done = root / "datasets/shapes/made.json"
    recipe = {"num": arguments.num, "seed": arguments.seed, "source": source_hash()}
    if is_complete(root, table, done, recipe):
        print(f"{table}: complete, {arguments.num} files")
        return
    done.unlink(missing_ok=True)
    write_files(root, table, arguments.num, arguments.seed)
    text_encoders.make_t5(root / "ckpts/shapes/t5")
    text_encoders.make_clip(root / "ckpts/shapes/clip")
    fit_autoencoder(root, table)
    done.write_text(json.dumps(recipe) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1920, help="files to write; a multiple of 480 balances all prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default=".", help="where datasets/ and ckpts/ are")
    return parser.parse_args()


def source_hash() -> str:
    """Of the code that makes the files: another version makes them anew."""
    autoencoder = Path(__file__).parents[2] / "opensora/models/autoencoder/linear_causal.py"
    sources = [Path(__file__), Path(render.__file__), Path(text_encoders.__file__), autoencoder]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def is_complete(root: Path, table: Path, done: Path, recipe: dict) -> bool:
    if not done.exists() or json.loads(done.read_text()) != recipe:
        return False
    made = ("ae.safetensors", "t5/model.safetensors", "clip/model.safetensors")
    wanted = [root / path for path, _ in read_table(table)] if table.exists() else []
    wanted += [table, prompts_path(table), *(root / "ckpts/shapes" / name for name in made)]
    return all(path.exists() for path in wanted)


def prompts_path(table: Path) -> Path:
    return table.with_name("shapes_prompts.csv")


def write_files(root: Path, table: Path, num: int, seed: int) -> None:
    """The clips and images, then the table of them and that of the prompts."""
    folder = root / "datasets/shapes"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.mp4"), *folder.glob("*.png")]:
        stale.unlink()
    with ProcessPoolExecutor(max_workers=2) as pool:
        names = list(pool.map(write_one, [folder] * num, range(num), [seed] * num, chunksize=48))
    # A sentence, as sampling makes one of a prompt: the model meets the same tokens in both.
    rows = [(f"datasets/shapes/{name}", plan(index)[0].prompt + ".") for index, name in enumerate(names)]
    write_csv(table, ("path", "text"), rows)
    write_csv(prompts_path(table), ("text",), [(subject.prompt,) for subject in render.subjects()])
    counts = {frames: sum(plan(index)[1] == frames for index in range(num)) for frames in sorted(set(BLOCKS))}
    print(f"{table}: " + ", ".join(f"{count} files of {frames} frames" for frames, count in counts.items()))


def plan(index: int) -> tuple[render.Subject, int]:
    """What file `index` shows and its number of frames."""
    subjects = render.subjects()
    subject = subjects[index % len(subjects)]
    frames = BLOCKS[index // len(subjects) % len(BLOCKS)]
    return (subject if frames > 1 else subject._replace(direction=None)), frames


def write_one(folder: Path, index: int, seed: int) -> str:
    subject, num_frames = plan(index)
    frames = render.draw_clip(subject, num_frames, SIZE, np.random.default_rng([seed, index]))
    name = f"{index:05d}.{'mp4' if num_frames > 1 else 'png'}"
    if num_frames > 1:
        render.write_video(folder / name, frames)
    else:
        Image.fromarray(frames[0]).save(folder / name)
    return name


def fit_autoencoder(root: Path, table: Path) -> None:
    """Fit to clips of the table; say how well clips that it was not fitted to come back."""
    import torch

    from opensora.models.autoencoder import LinearCausal

    clips = [path for path, _ in read_table(table) if path.endswith(".mp4")]
    frames = [render.read_frames(root / path) for path in clips[: FIT_CLIPS + FIT_CLIPS // 4]]
    videos = [torch.from_numpy(f).permute(3, 0, 1, 2)[None] / 127.5 - 1 for f in frames]  # [1, 3, T, H, W]
    autoencoder = LinearCausal()
    autoencoder.fit(videos[:FIT_CLIPS])
    path = root / "ckpts/shapes/ae.safetensors"
    autoencoder.save(path)
    errors = [(autoencoder.decode(autoencoder.encode(v)).clamp(-1, 1) - v).square().mean() for v in videos[-96:]]
    print(f"{path}: {10 * torch.log10(4 / torch.stack(errors).mean()).item():.1f} dB on {len(errors)} clips")


def read_table(table: Path) -> list[tuple[str, str]]:
    """(path, text) of each row."""
    with table.open(newline="", encoding="utf-8") as file:
        return [(row["path"], row["text"]) for row in csv.DictReader(file)]


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
