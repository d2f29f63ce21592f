"""Files that are whole once they have their name, a power cut included, and files that one process at a time holds."""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, lockf
from pathlib import Path
from typing import IO, BinaryIO

from opensora.common import get_logger


class HeldError(OSError):
    """Another process holds the file. `holder`: which one, as far as it is known."""

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


def sync_file(path: Path) -> None:
    """What is written to a file is on the disk when this returns."""
    _sync(path)


def sync_folder(path: Path) -> None:
    """The names in a folder are on the disk when this returns; where the file system cannot say so, they may not be."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file; it is on the disk when this returns."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a file, or a folder of files that are synced, its final name when what it holds is on the disk; so is the
    name when this returns. It takes the place of another file, not of another folder."""
    if temporary.is_dir():
        sync_folder(temporary)
    else:
        sync_file(temporary)
    os.replace(temporary, final)
    sync_folder(final.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write a file that has its name, in place of an older one, only when the block ends without an
    error and all of it is on the disk. Its folder is made if need be.

    No other process, of this host or another, has the same place to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}.tmp")  # no longer than names may be
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, texts in UTF-8, that has its name only when it is whole (`whole_file`)."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def hold(path: Path) -> IO[str]:
    """Hold a file, which is made and says who holds it, until what is returned is closed or this process ends.

    Raises:
        HeldError: another process does.
    """
    file = open(path, "a+")  # noqa: SIM115 - held for longer than this function
    try:
        lock(file)
    except HeldError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise HeldError(holder or "unknown process") from None
    with suppress(OSError):  # a full disk is for those who have more to write
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def lock(file: IO) -> None:
    """Lock an open file for this process until it is closed; on a file system without locks, only warn.

    A POSIX lock: it ends with the process, however that ends, and processes that it forks do not inherit it.

    Raises:
        HeldError: another process has.
    """
    try:
        lockf(file, LOCK_EX | LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise HeldError("unknown process") from None
        get_logger().warning(
            "'%s' cannot be locked (%s): see to it that no other run writes there", file.name, error.strerror
        )
