"""Frames of a video by their number, decoding only from the keyframe before the first of them.

A frame's number is its place in a full decode. To start in the middle, the number of a keyframe must be known: in plain
mp4 and mov files it is the place in their index, in others the packets before it are counted (but not decoded). Every
assumption is checked on the way; where one fails, the file is decoded from its start.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from av import VideoFrame
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from opensora.data.container_layout import mp4_layout
from opensora.data.frame_index import (
    REORDER_DEPTH,
    count_leading,
    hidden_entries,
    index_is_whole,
    opening_packets,
    packets_are_frames,
)
from opensora.data.media import MediaError, open_video

# Decoders that can be told anew for each packet to leave out pictures that no other picture needs.
SKIPPING_DECODERS = frozenset({"h264", "hevc"})


class _Keyframe(NamedTuple):
    """A packet to start from: the frames stored before it, the time to seek to, and what it is recognised by."""

    before: int
    time: int
    pos: int
    size: int


class _Entry(NamedTuple):
    """Packets from a keyframe on, with the number of frames stored before it."""

    before: int
    packets: Iterable[Packet]


class _Untrusted(Exception):
    """The packets' order is not what frames' numbers were taken from."""


def read_frames(path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) for each of the ascending `numbers`.

    Should a start in the middle prove wrong, the frames come again from the first one on: the later ones are right.

    Raises:
        MediaError: the file cannot be read, is damaged on the way, or has fewer frames.
    """
    try:
        with open_video(path) as (container, stream):
            entry = _find_entry(path, container, stream, numbers[0])
            if entry is not None:
                yield from _decode_from(path, stream, entry, numbers)
                return
    except (_Untrusted, MediaError):
        pass  # a file that is really damaged says so again
    with open_video(path) as (container, stream):
        yield from _decode_all(path, container.decode(stream), numbers)


def _decode_all(path: Path, frames: Iterable[VideoFrame], numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
    wanted, count = set(numbers), 0
    for count, frame in enumerate(frames, start=1):
        if count - 1 in wanted:
            yield count - 1, _intact(path, frame)
        if count > numbers[-1]:
            return
    raise MediaError(path, f"too few frames: {count} can be decoded, number {numbers[-1]} (from 0) was asked for")


def _decode_from(
    path: Path, stream: VideoStream, entry: _Entry, numbers: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """As `_decode_all`; a frame's number is how many shown packets precede it in time, since the entry and before."""
    wanted, times = set(numbers), []  # times of the shown packets that the decoder was given, ascending
    can_skip = stream.codec_context.name in SKIPPING_DECODERS
    begin = latest = None
    for packet in entry.packets:
        if packet.size:
            begin = packet.pts if begin is None else begin
            _insert_time(times, packet, latest)
            before_window = entry.before + len(times) + REORDER_DEPTH < numbers[0]
            stream.codec_context.skip_frame = "NONREF" if can_skip and before_window else "DEFAULT"
        for frame in packet.decode():
            if frame.pts is None or frame.pts < begin:
                continue  # shown before the entry, and built on what is before it
            latest = frame.pts
            number = entry.before + bisect_left(times, frame.pts)
            if number in wanted:
                wanted.discard(number)
                yield number, _intact(path, frame)
            if not wanted:
                return
    raise _Untrusted


def _insert_time(times: list[int], packet: Packet, latest: int | None) -> None:
    """_Untrusted if numbers cannot be told from times, or a frame was given its number too early."""
    if packet.is_discard:
        return
    if packet.pts is None or (latest is not None and packet.pts <= latest):
        raise _Untrusted
    place = bisect_left(times, packet.pts)
    if place < len(times) and times[place] == packet.pts:
        raise _Untrusted
    insort(times, packet.pts)


def _intact(path: Path, frame: VideoFrame) -> VideoFrame:
    if frame.is_corrupt:
        raise MediaError(path, "damaged: a frame is incomplete")
    return frame


def _find_entry(path: Path, container: InputContainer, stream: VideoStream, target: int) -> _Entry | None:
    """The last place from which frame number `target` and those after it are decoded as in a full decode."""
    opening = opening_packets(container, stream)
    if not packets_are_frames(container, stream, opening):
        return None
    if index_is_whole(mp4_layout(path), stream):
        keyframes = _indexed_keyframes(stream, opening[0], target)
    else:
        keyframes = _counted_keyframes(chain(opening, container.demux(stream)), target)
    for keyframe in keyframes:
        container.seek(keyframe.time, stream=stream)
        packets = opening_packets(container, stream)
        if not packets or (packets[0].pos, packets[0].size) != (keyframe.pos, keyframe.size):
            return None
        # Frames shown before the keyframe but stored after it (open groups of pictures) need the one before it.
        if target >= keyframe.before + count_leading(packets):
            return _Entry(keyframe.before, chain(packets, container.demux(stream)))
    return None


def _indexed_keyframes(stream: VideoStream, first: Packet, target: int) -> Iterator[_Keyframe]:
    """Keyframes stored at or before the target's place, the last one first.

    The index has decoding times, seeking compares showing times: at keyframes they are as far apart as at the first.
    """
    index = stream.index_entries
    hidden = hidden_entries(index)
    delay = first.pts - first.dts if first.dts is not None else 0
    place = target
    for number in hidden:
        place += number <= place
    while 0 <= place < len(index):
        keyframe = index.search_timestamp(index[place].timestamp)
        if not 0 <= keyframe <= place:
            return
        entry = index[keyframe]
        yield _Keyframe(keyframe - bisect_left(hidden, keyframe), entry.timestamp + delay, entry.pos, entry.size)
        place = keyframe - 1


def _counted_keyframes(packets: Iterable[Packet], target: int) -> Iterator[_Keyframe]:
    """As `_indexed_keyframes`, from reading all packets up to the target's."""
    keyframes, shown = [], 0
    for packet in packets:
        if packet.is_keyframe and packet.pts is not None:
            keyframes.append(_Keyframe(shown, packet.pts, packet.pos, packet.size))
        shown += bool(packet.size) and not packet.is_discard
        if shown > target:
            break
    yield from reversed(keyframes)
