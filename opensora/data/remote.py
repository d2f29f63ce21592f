"""Files behind a URL (https://, s3://, memory:// ...), read through fsspec where that is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

# What is fetched at a time, and how much of a file is held: heads and tails are read again and again.
BLOCK_BYTES, HELD_BLOCKS = 1 << 20, 8
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def locate(path: str | Path) -> Path | RemoteFile:
    """The file of a table's path: a URL is anything that begins with a protocol and `://`."""
    return RemoteFile(str(path)) if isinstance(path, str) and URL.match(path) else Path(path)


class RemoteFile:
    """Has of a Path what reading needs: `open`, `stat().st_size`, its name as a string. All errors are OSErrors."""

    def __init__(self, url: str):
        self.url = url

    def __str__(self) -> str:
        return self.url

    def open(self, mode: str = "rb") -> BinaryIO:
        """A reader with a position of its own; what was fetched is shared by all that this object opens."""
        return _Reader(self._file)

    def stat(self) -> os.stat_result:
        return os.stat_result((0, 0, 0, 0, 0, 0, self._file.size, 0, 0, 0))

    @cached_property
    def _file(self) -> Any:
        """fsspec's file object, which ends with this one."""
        try:
            import fsspec
        except ImportError:
            raise OSError("a URL needs the package fsspec: pip install fsspec") from None
        with _as_os_errors():
            system, path = fsspec.core.url_to_fs(self.url)
            options = {"cache_type": "blockcache", "cache_options": {"maxblocks": HELD_BLOCKS}}
            file = system.open(path, "rb", block_size=BLOCK_BYTES, **options)
        if getattr(file, "size", None) is None:
            raise OSError("the server does not tell the file's size, or cannot send a part of it")
        return file


class _Reader(RawIOBase):
    def __init__(self, file: Any):
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.file.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        with _as_os_errors():
            self.file.seek(min(self.place, self.file.size))
            data = self.file.read(size)
        self.place += len(data)
        return data


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Whatever the package that serves the protocol raises, also that there is none."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
