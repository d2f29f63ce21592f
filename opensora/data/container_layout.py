"""What the bytes of a media file say before a decoder is asked: its kind, its declared end, the layout of an mp4.

Sources: ISO/IEC 14496-12 (mp4 boxes), RFC 8794 (EBML), the RIFF and GIF89a specifications.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

IDENTITY_MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
MP4_BEGINNINGS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
# Where the display matrix lies in these boxes' bodies (version 0).
MATRIX_OFFSET = {b"tkhd": 40, b"mvhd": 36}
EBML_HEADER, MATROSKA_SEGMENT = 0x1A45DFA3, 0x18538067
# Trailers may be followed by a few bytes of padding.
TRAILER_WINDOW = 64


def is_image(path: Path) -> bool:
    """Whether the content, not the name, is a still image's. An animated GIF is a video; so is what is unknown."""
    with path.open("rb") as file:
        head = file.read(12)
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*"))
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
        or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
    )


def is_cut(path: Path) -> bool:
    """Whether the file ends before the place that it says it ends at. Broadcast files, for one, do not say: False."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"GIF8":
            return b";" not in _tail(file, size)
        if head[:4] == b"RIFF":
            return _riff_end(file, size) > size
        if head[4:8] in MP4_BEGINNINGS:
            return _mp4_is_cut(file, size)
        if head[:4] == EBML_HEADER.to_bytes(4, "big"):
            return _matroska_end(file) > size
    return False


def image_is_whole(path: Path) -> bool:
    """Whether the trailer of a PNG or JPEG is where it should be; False says nothing (other formats, appended data)."""
    with path.open("rb") as file:
        tail = _tail(file, path.stat().st_size)
    return b"IEND\xaeB`\x82" in tail or b"\xff\xd9" in tail


def _tail(file: BinaryIO, size: int) -> bytes:
    file.seek(max(0, size - TRAILER_WINDOW))
    return file.read()


def _riff_end(file: BinaryIO, size: int) -> int:
    """The declared end of the last RIFF chunk that begins in the file (large AVI files are a chain of them)."""
    start = end = 0
    while start + 8 <= size:
        file.seek(start)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length == 0:  # 0: the writer never came back to fill it in
            break
        start = end = start + 8 + length + length % 2
    return end - 1 if end == size + 1 else end  # the padding byte of the last chunk is often missing


def _mp4_is_cut(file: BinaryIO, size: int) -> bool:
    """Whether the index is missing, or a box goes on beyond the end."""
    kinds = set()
    for kind, _, end in _boxes(file, 0, size, clip=False):
        if kind in (b"moov", b"moof", b"mdat") and end > size:
            return True
        kinds.add(kind)
    return b"moov" not in kinds


def _matroska_end(file: BinaryIO) -> int:
    """The declared end of the segment; 0 where its length is unknown (live streams)."""
    file.seek(4)
    header = _ebml_number(file)
    file.seek(header, 1)
    if file.read(4) != MATROSKA_SEGMENT.to_bytes(4, "big"):
        return 0
    first = file.read(1)
    file.seek(-len(first), 1)
    length = _ebml_number(file)
    unknown = bool(first) and length == (1 << 7 * (9 - first[0].bit_length())) - 1
    return 0 if unknown else file.tell() + length


def _ebml_number(file: BinaryIO) -> int:
    """A variable-length number: the leading zero bits of its first byte count the bytes that follow."""
    first = int.from_bytes(file.read(1), "big")
    following = 8 - first.bit_length()
    return int.from_bytes(bytes([first & (0xFF >> following + 1)]) + file.read(following), "big")


@dataclass(frozen=True)
class Mp4Layout:
    """What decides whether an mp4's index can be taken at its word.

    Attributes:
        indexed: it has an index (moov) at all.
        fragmented: the index goes on in fragments throughout the file.
        turned: frames are not shown as they are stored (rotated or mirrored).
        edits: how many pieces of a track are played (the largest number of a track).
    """

    indexed: bool = False
    fragmented: bool = False
    turned: bool = False
    edits: int = 0


def mp4_layout(path: Path) -> Mp4Layout | None:
    """The layout of an mp4, mov, m4v or 3gp file; None for other files."""
    with path.open("rb") as file:
        if file.read(8)[4:] not in MP4_BEGINNINGS:
            return None
        found = {kind: (start, end) for kind, start, end in _boxes(file, 0, path.stat().st_size)}
        if b"moov" not in found:
            return Mp4Layout()
        fragmented, turned, edits = False, False, 0
        for kind, start, end in _boxes(file, *found[b"moov"]):
            fragmented |= kind == b"mvex"
            if kind == b"mvhd":
                turned |= not _has_identity_matrix(file, kind, start)
            if kind == b"trak":
                track_turned, track_edits = _read_track(file, start, end)
                turned, edits = turned | track_turned, max(edits, track_edits)
        return Mp4Layout(True, fragmented, turned, edits)


def _read_track(file: BinaryIO, start: int, end: int) -> tuple[bool, int]:
    """(turned, number of pieces played) of a `trak` box."""
    turned, edits = False, 0
    for kind, box_start, box_end in _boxes(file, start, end):
        if kind == b"tkhd":
            turned = not _has_identity_matrix(file, kind, box_start)
        if kind == b"edts":
            for inner, inner_start, inner_end in _boxes(file, box_start, box_end):
                if inner == b"elst":
                    edits = _count_edits(file, inner_start, inner_end)
    return turned, edits


def _has_identity_matrix(file: BinaryIO, kind: bytes, start: int) -> bool:
    """Of a `tkhd` or `mvhd` body that begins at `start`; version 1 has wider times before the matrix."""
    file.seek(start)
    wide = file.read(1) == b"\x01"
    file.seek(start + MATRIX_OFFSET[kind] + 12 * wide)
    return file.read(36) == IDENTITY_MATRIX


def _count_edits(file: BinaryIO, start: int, end: int) -> int:
    """The entries of an `elst` body that play something (a media time of -1 is a pause)."""
    file.seek(start)
    body = file.read(min(end - start, 1 << 16))
    entry, media_time = (20, slice(8, 16)) if body[:1] == b"\x01" else (12, slice(4, 8))
    entries = [body[i : i + entry] for i in range(8, len(body) - entry + 1, entry)]
    return sum(item[media_time] != b"\xff" * len(item[media_time]) for item in entries)


def _boxes(file: BinaryIO, start: int, end: int, clip: bool = True) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the bodies of the boxes that lie one after the other in [start, end); `clip`: say that the
    last one ends there, whatever it says."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        body = start + 8
        if size == 1 and body + 8 <= end:
            (size,) = struct.unpack(">Q", file.read(8))
            body += 8
        elif size == 0:
            size = end - start
        if start + size < body:
            return
        yield kind, body, min(start + size, end) if clip else start + size
        start += size
