"""The facts of a media file that the table needs: read from its header, counted where the header cannot know them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from av import VideoFrame
from av.packet import Packet
from av.video.stream import VideoStream
from PIL import ExifTags

from opensora.data.container_layout import image_is_whole, is_cut, is_image, mp4_layout
from opensora.data.frame_index import hidden_entries, index_is_whole, opening_packets, packets_are_frames
from opensora.data.media import CUT_SHORT, MediaError, open_image, open_video, orientation, require_file
from opensora.data.remote import locate

# A header's rate that is further than this from the counted one is not believed (variable rate, guesses of matroska).
RATE_TOLERANCE = 0.05
# Tracks are interleaved: the video's last bytes are those of one of its last samples, which may not be the very last.
LAST_SAMPLES = 64


class VideoFacts(NamedTuple):
    """A file as it is shown (rotation honoured). fps is NaN where unknown, and for a single frame: it has no rate."""

    num_frames: int
    height: int
    width: int
    fps: float


class _Count(NamedTuple):
    """Frames, and the seconds from the first to the last of them where they were looked at."""

    num_frames: int
    seconds: float | None


def probe(path: str | Path, verify: bool = False) -> VideoFacts:
    """The facts of a video or image file, or of a URL (see `remote`).

    Of a plain mp4 or mov only the header is read; of other files the packets are counted, or the frames decoded where
    packets do not tell. Whether pictures are intact is not looked at: that shows only in decoding them.

    Args:
        verify: decode all pictures all the same. Damage that leaves a stream which the codec allows is not found.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a video or image; empty, truncated, unreadable. Both are MediaErrors with a one-line reason.
    """
    path = locate(path)
    require_file(path)
    if is_image(path):
        return _probe_image(path, verify)
    facts = _probe_video(path)
    if verify:
        _verify(path, facts.num_frames)
    return facts


def _probe_image(path: Path, verify: bool) -> VideoFacts:
    with open_image(path) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # 5..8 are the transposed ones
            width, height = height, width
        if verify or not image_is_whole(path):
            image.load()
    return VideoFacts(1, height, width, math.nan)


def _probe_video(path: Path) -> VideoFacts:
    layout = mp4_layout(path)
    if layout is None and is_cut(path):  # an mp4's index tells more: whether pictures are missing
        raise MediaError(path, CUT_SHORT)
    with open_video(path, header_only=layout is not None) as (container, stream):
        opening = opening_packets(container, stream)
        countable = packets_are_frames(container, stream, opening)
        if countable and index_is_whole(layout, stream):
            count = _count_index(path, stream)
        elif countable:
            count = _count_packets(_whole(path, chain(opening, container.demux(stream))))
        # An mp4 says in its boxes whether it is turned; of other files a frame must be asked.
        first = next(_decode(opening), None) if layout is None or layout.turned else None
        height, width = (first.height, first.width) if first else (stream.height, stream.width)
        header_rate = float(stream.average_rate or stream.guessed_rate or math.nan)
    if not countable:
        with open_video(path) as (container, stream):
            count = _count_frames(path, _decode(_whole(path, container.demux(stream))))
    if count.num_frames == 0:
        raise MediaError(path, CUT_SHORT if is_cut(path) else "no frames")
    if first is not None and orientation(first).transposed:
        height, width = width, height
    return VideoFacts(count.num_frames, height, width, _frame_rate(header_rate, count))


def _verify(path: Path, num_frames: int) -> None:
    """MediaError unless all pictures are decoded without a complaint."""
    count = 0
    with open_video(path) as (container, stream):
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        for frame in container.decode(stream):
            count += not frame.is_corrupt
    if count != num_frames:
        raise MediaError(path, f"damaged: {count} of {num_frames} frames can be decoded")


def _count_index(path: Path, stream: VideoStream) -> _Count:
    index = stream.index_entries
    end = max(entry.pos + entry.size for entry in index[max(0, len(index) - LAST_SAMPLES) :])
    size = path.stat().st_size
    if end > size:
        raise MediaError(path, f"truncated: {size} of at least {end} bytes")
    return _Count(len(index) - len(hidden_entries(index)), None)


def _count_packets(packets: Iterable[Packet]) -> _Count:
    times = [_time(packet) for packet in packets if packet.size and not packet.is_discard]
    return _Count(len(times), _seconds(times))


def _time(packet: Packet) -> float | None:
    return None if packet.pts is None else float(packet.pts * packet.time_base)


def _count_frames(path: Path, frames: Iterable[VideoFrame]) -> _Count:
    times, cut = [], False
    for frame in frames:
        times.append(frame.time)
        cut = frame.is_corrupt
    if cut:
        raise MediaError(path, "truncated: the last frame is incomplete")
    return _Count(len(times), _seconds(times))


def _seconds(times: Sequence[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return max(known) - min(known) if known else None


def _whole(path: Path, packets: Iterable[Packet]) -> Iterator[Packet]:
    """The packets; MediaError after the last of them if the file's end cuts it."""
    cut = False
    for packet in packets:
        if packet.size:
            cut = packet.is_corrupt
        yield packet
    if cut:
        raise MediaError(path, "truncated: the file ends within a frame")


def _decode(packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        yield from packet.decode()


def _frame_rate(header_rate: float, count: _Count) -> float:
    """Frames per second, the header's where it is not contradicted."""
    if count.num_frames == 1:
        return math.nan
    if not count.seconds:
        return header_rate
    counted_rate = (count.num_frames - 1) / count.seconds
    return header_rate if abs(header_rate / counted_rate - 1) < RATE_TOLERANCE else counted_rate
