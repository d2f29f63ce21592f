"""Opening of media files: what can go wrong with one, said in one line, and how a frame is meant to be shown."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Discard, Disposition
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from opensora.data.container_layout import is_cut
from opensora.data.remote import RemoteFile

# Options of FFmpeg: what an mp4's boxes say is enough, no packets are read on opening.
HEADER_ONLY = {"skip_frame": "all", "threads": "1", "probesize": "32", "analyzeduration": "0"}
CUT_SHORT = "truncated: the file is shorter than it says it is"


class MediaError(ValueError):
    """A file that no clip can be taken from.

    Attributes:
        path: of the file.
        reason: one line; the part before its first colon is one of a few kinds, for counting.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class MissingFile(MediaError, FileNotFoundError):
    """There is no file of that name."""


def require_file(path: Path) -> None:
    """MissingFile or MediaError unless there is a file that can be opened and has content."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except IsADirectoryError:
        raise MediaError(path, "not a file: a folder") from None
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(path, "file not found") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise MediaError(path, f"cannot be read: {one_line(error)}") from None
    if empty:
        raise MediaError(path, "empty file")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image as it is stored (see `to_rgb`), its pixels not yet read.

    Raises:
        MediaError: not an image, or (also while the caller reads its pixels) a damaged one.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except MediaError:
        raise
    except Image.UnidentifiedImageError:
        raise MediaError(path, "not a video or image: unknown content") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error) else "damaged"
        raise MediaError(path, f"{kind}: {one_line(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright. Alpha is dropped; 16-bit grey is scaled (PIL's own conversion clips it)."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def open_video(path: Path, header_only: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, for one decoding thread; nothing is read of the other streams.

    Args:
        header_only: of an mp4, do not read packets to learn what its boxes leave open (the depth of reordering, guessed
            by some decoders): quicker, right for facts but not for frames.

    Raises:
        MediaError: cannot be opened, or has no video stream (cover art is none), or is found damaged while the caller
            reads it.
    """
    # Any other level installs a callback that can deadlock with decoding threads; None also keeps stderr clean.
    av.logging.set_level(None)
    options, opening = HEADER_ONLY if header_only else {}, True
    try:
        # "file:": a colon in the name is no protocol. The encoding of titles and the like must not matter.
        name = path.open() if isinstance(path, RemoteFile) else f"file:{path}"
        with av.open(name, metadata_errors="ignore", options=options) as container:
            opening, stream = False, _video_stream(path, container)
            stream.thread_count = 1
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            yield container, stream
    except MediaError:
        raise
    except av.error.FFmpegError as error:
        raise MediaError(path, _reason(path, error, opening)) from None
    except OSError as error:  # a server's
        raise MediaError(path, f"cannot be read: {one_line(error)}") from None
    except IndexError:  # PyAV's, for a stream that was not there on opening (broken broadcast files)
        raise MediaError(path, "damaged: a stream begins in the middle of the file") from None


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(path, "no video stream")
    if streams[0].codec_context is None:
        raise MediaError(path, "no decoder: unknown video codec")
    if not (streams[0].width and streams[0].height):
        raise MediaError(path, "damaged: the size of its pictures is unknown")
    return streams[0]


def _reason(path: Path, error: av.error.FFmpegError, opening: bool) -> str:
    if is_cut(path):
        return CUT_SHORT
    return f"{'not a video or image' if opening else 'damaged'}: {one_line(error.strerror or error)}"


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Orientation(NamedTuple):
    """How a stored frame becomes the one that is shown: transposed first, then mirrored."""

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """[H, W, C] as stored -> [H, W, C] or [W, H, C] as shown (a view)."""
        if self.transposed:
            frame = frame.swapaxes(0, 1)
        return frame[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def orientation(frame: av.VideoFrame) -> Orientation:
    """The nearest of the eight orientations to the frame's display matrix (rows a b u, c d v, x y w: a stored pixel
    (p, q) is shown at (a p + c q + x, b p + d q + y))."""
    # PyAV ties a frame whose side data was read into a reference cycle, which stays until the garbage collector runs: a
    # tiny copy, not pictures of megabytes.
    tiny = frame.reformat(width=16, height=16, format="gray8", interpolation=Interpolation.POINT)
    matrix = tiny.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) > abs(a):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)
