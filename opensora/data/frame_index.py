"""When a container's packets tell a frame's number: shared by counting frames and by seeking to one.

Frames are numbered in the order that a full decode gives them. Packets come in decoding order, which differs where
there are B-frames, and not every packet is shown (edit lists trim).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from av.container import InputContainer
from av.index import IndexEntries
from av.packet import Packet
from av.video.stream import VideoStream

from opensora.data.container_layout import Mp4Layout

# Codecs of which every packet gives one frame. Others have invisible (vp8) or skipped (mpeg4) pictures.
ONE_FRAME_A_PACKET = frozenset(
    {"h264", "hevc", "vp9", "av1", "gif", "mjpeg", "png", "prores", "dnxhd", "ffv1", "rawvideo"}
)
BROADCAST_FORMATS = frozenset({"mpegts", "mpeg"})
# The most frames that a codec can store between a frame and another that is shown before it.
REORDER_DEPTH = 16


def opening_packets(container: InputContainer, stream: VideoStream) -> list[Packet]:
    """The next packets of the stream: enough to see every frame that is shown before the first of them."""
    return [packet for packet in islice(container.demux(stream), REORDER_DEPTH + 1) if packet.size]


def count_leading(packets: Sequence[Packet]) -> int:
    """How many frames are stored after the first of these packets but shown before it (as after an open GOP's key)."""
    first = packets[0].pts
    return sum(p.pts is not None and first is not None and p.pts < first and not p.is_discard for p in packets)


def packets_are_frames(container: InputContainer, stream: VideoStream, opening: Sequence[Packet]) -> bool:
    """Whether the n-th packet in showing order is the n-th frame of a full decode; `opening`: the file's first packets.

    Not where the stream begins in the middle of a group of pictures (the decoder leaves out what it cannot rebuild),
    as broadcast formats do as a rule.
    """
    known = stream.codec.canonical_name in ONE_FRAME_A_PACKET and container.format.name not in BROADCAST_FORMATS
    return known and bool(opening) and opening[0].is_keyframe and count_leading(opening) == 0


def index_is_whole(layout: Mp4Layout | None, stream: VideoStream) -> bool:
    """Whether the index that is known on opening lists every packet once: plain mp4 and mov files."""
    plain = layout is not None and layout.indexed and not layout.fragmented and layout.edits <= 1
    return plain and len(stream.index_entries) > 0


def hidden_entries(index: IndexEntries) -> list[int]:
    """Numbers of the index's entries, ascending, that are decoded but not shown.

    One edit list entry cuts off the two ends only, so that the middle of a long index need not be read.
    """
    hidden_at_start, start = _hidden_run(index, range(len(index)))
    hidden_at_end, _ = _hidden_run(index, range(len(index) - 1, start - 1, -1))
    return hidden_at_start + hidden_at_end[::-1]


def _hidden_run(index: IndexEntries, numbers: range) -> tuple[list[int], int]:
    """The hidden ones up to where the shown ones begin, and the count of entries looked at."""
    hidden, shown = [], 0
    for looked_at, number in enumerate(numbers):
        if shown > 2 * REORDER_DEPTH:
            return hidden, looked_at
        if index[number].is_discard:
            hidden.append(number)
            shown = 0
        else:
            shown += 1
    return hidden, len(numbers)
