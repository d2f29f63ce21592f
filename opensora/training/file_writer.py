"""Bytes in memory to files on the disk, as fast as it takes them.

Several threads write large chunks past the page cache (O_DIRECT) where the file system allows it: the cache would take
memory and a copy, and be flushed at the end all the same. Where TensorNVMe's AsyncFileWriter is installed that writes.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opensora.checkpoint_manifest import CHUNK_BYTES, FileRecord, checksum, differences
from opensora.common import get_logger
from opensora.durable import sync_file

THREADS = 4
PAGE_BYTES = 4096
INSTALL_TENSORNVME = "pip install git+https://github.com/hpcaitech/TensorNVMe.git (it needs CUDA's headers)"

Writer = Callable[[Path, Mapping[str, memoryview]], dict[str, FileRecord]]


def choose_writer(in_background: bool) -> Writer:
    """TensorNVMe's writer where it is installed, else threads; both write the same bytes."""
    try:
        from tensornvme.async_file_io import AsyncFileWriter
    except (ImportError, OSError) as error:  # OSError: a library that it was built with is gone
        if in_background:
            get_logger().info(
                f"checkpoints are written by {THREADS} threads; by TensorNVMe where it is installed with "
                f"async_file_io ({error}): {INSTALL_TENSORNVME}"
            )
        return write_files
    get_logger().info("checkpoints are written by TensorNVMe")
    return lambda folder, files: write_files_by_tensornvme(folder, files, AsyncFileWriter)


def write_files(folder: Path, files: Mapping[str, memoryview]) -> dict[str, FileRecord]:
    """Write files to `folder`; their bytes are on the disk when this returns (their names are not: sync the folders).

    Returns:
        What a manifest says of each.

    Raises:
        OSError: one could not be written; some may have been.
    """
    opened = {}
    try:
        for name in files:
            opened[name] = _File(folder / name)
        checksums = _over_chunks(files, lambda name, start, chunk: opened[name].write(chunk, start))
        for file in opened.values():
            file.sync()
    finally:
        for file in opened.values():
            file.close()
    return _records(folder, files, checksums)


def write_files_by_tensornvme(
    folder: Path, files: Mapping[str, memoryview], make_writer: Callable[..., Any]
) -> dict[str, FileRecord]:
    """`write_files` by `tensornvme.async_file_io.AsyncFileWriter`, which is `make_writer`.

    It says nothing of a write that failed or was short, and neither shortens a file that was there nor flushes it: what
    it wrote is read again.
    """
    checksums = {}
    for name, data in files.items():
        path = folder / name
        open(path, "wb").close()
        if len(data):
            writer, address = make_writer(str(path), n_entries=16, backend="pthread"), _address(data)
            for start in range(0, len(data), CHUNK_BYTES):
                writer.write_raw(data, address + start, len(data[start : start + CHUNK_BYTES]), start)
            checksums |= _over_chunks({name: data}, lambda *_: None)
            writer.synchronize()
            del writer  # closes the file
        sync_file(path)
    records = _records(folder, files, checksums)
    wrong = differences(folder, records)
    if wrong:
        raise OSError(errno.EIO, f"TensorNVMe did not write it all: {wrong[0]}")
    return records


def _over_chunks(
    files: Mapping[str, memoryview], work: Callable[[str, int, memoryview], None]
) -> dict[tuple[str, int], str]:
    """Do `work(file, first byte, chunk)` for all chunks by several threads; their checksums by file and first byte."""
    chunks = [(name, start) for name, data in files.items() for start in range(0, len(data), CHUNK_BYTES)]

    def do(chunk: tuple[str, int]) -> str:
        name, start = chunk
        data = files[name][start : start + CHUNK_BYTES]
        work(name, start, data)
        return checksum(data)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as threads:
        try:
            return dict(zip(chunks, threads.map(do, chunks), strict=True))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _records(
    folder: Path, files: Mapping[str, memoryview], checksums: Mapping[tuple[str, int], str]
) -> dict[str, FileRecord]:
    """What a manifest says of the files; OSError if one is not as large as what was to be written."""
    for name, data in files.items():
        size = (folder / name).stat().st_size
        if size != len(data):
            raise OSError(errno.EIO, f"{name} has {size} of {len(data)} bytes")
    starts = {name: range(0, len(data), CHUNK_BYTES) for name, data in files.items()}
    return {
        name: FileRecord(len(data), tuple(checksums[name, start] for start in starts[name]))
        for name, data in files.items()
    }


class _File:
    """A new file that is written in chunks, in any order, by any thread."""

    def __init__(self, path: Path):
        flags = os.O_CREAT | os.O_WRONLY
        self._cached = os.open(path, flags | os.O_TRUNC, 0o666)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system has no such thing
                os.close(self._cached)
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write at a multiple of a page, from memory that begins at one."""
        done = 0
        if self._direct is not None:
            try:
                done = os.pwrite(self._direct, data[: len(data) // PAGE_BYTES * PAGE_BYTES], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        while done < len(data):  # what is less than a page, and what the system left over
            done += os.pwrite(self._cached, data[done:], offset + done)

    def sync(self) -> None:
        os.fsync(self._cached)

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
