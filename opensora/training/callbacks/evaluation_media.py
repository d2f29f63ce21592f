"""An evaluation's numbers and samples as loggers take them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.training.evaluation import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard shows videos as GIFs inside its own file: small ones.
GIF_SIDE, GIF_FRAMES = 256, 48


def evaluation_scalars(evaluation: Evaluation) -> dict[str, float]:
    """The plotted numbers by name."""
    if evaluation.losses is None:
        return {}
    losses = evaluation.losses
    return {
        "eval/loss": losses.mean,
        **{f"eval_loss_by_clip/{clip}": loss for clip, loss in losses.by_clip.items()},
        **{f"eval_loss_by_time/{time}": loss for time, loss in losses.by_time.items()},
    }


def add_samples(writer: SummaryWriter, evaluation: Evaluation) -> None:
    """Put an evaluation's samples among TensorBoard's images; videos move."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for sample in evaluation.samples:
        frames, fps = read_small(sample.path)
        image = Summary.Image(
            height=frames.shape[1],
            width=frames.shape[2],
            colorspace=3,
            encoded_image_string=encode_gif(frames, fps),
        )
        value = Summary.Value(tag=f"eval/{sample.path.stem}", image=image)
        writer.file_writer.add_summary(Summary(value=[value]), evaluation.step)


def wandb_samples(evaluation: Evaluation) -> dict[str, Any]:
    """The samples in wandb's types, by name."""
    import wandb

    found = {}
    for sample in evaluation.samples:
        if sample.path.suffix == ".png":
            media = wandb.Image(str(sample.path), caption=sample.prompt)
        else:
            media = wandb.Video(str(sample.path), caption=sample.prompt, format="mp4")
        found[f"eval/{sample.path.stem}"] = media
    return found


def read_small(path: Path) -> tuple[NDArray[np.uint8], float]:
    """A sample's frames [T, H, W, 3], scaled down and thinned out to what a GIF may have, and their rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = [frame.to_image() for frame in container.decode(stream)]
        fps = float(stream.average_rate or 1)
    every = -(-len(pictures) // GIF_FRAMES)
    for picture in pictures:
        picture.thumbnail((GIF_SIDE, GIF_SIDE))
    return np.stack([np.asarray(picture) for picture in pictures[::every]]), fps / every


def encode_gif(frames: NDArray[np.uint8], fps: float) -> bytes:
    """An endless animation of frames [T, H, W, 3]."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return file.getvalue()
