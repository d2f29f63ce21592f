"""What is known of a table's files so far, on disk: an interrupted run does not read them again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from opensora.data.probe import VideoFacts
from opensora.data.table_stream import TableError
from opensora.durable import HeldError, lock

VERSION = 1
# What a machine that is switched off may lose.
SECONDS_BETWEEN_FLUSHES = 1.0
_READ_AT_ONCE = 4096  # results


class ProbeJournal:
    """Results in the order of the table's rows, a line of JSON each, after one that says what they are results of.

    To be used in a `with` statement; a second process on the same file is refused (TableError). A journal of another
    table, or of one that has changed since, is begun anew; so is the rest after a line that was cut.
    """

    def __init__(self, path: Path, source: Path, verify: bool):
        self.path, self.file = path, path.open("a+b")
        try:
            lock(self.file)
        except HeldError:
            self.file.close()
            raise TableError(f"'{path}' is in use: another run writes the same output") from None
        self.replaying, self.flushed = True, time.monotonic()
        facts = source.stat()
        header = [VERSION, str(source.resolve()), facts.st_size, facts.st_mtime_ns, str(Path.cwd()), verify]
        self.file.seek(0)
        if self._read_line() != header:
            self.file.truncate(0)
            self._append(header)

    def __enter__(self) -> ProbeJournal:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def remove(self) -> None:
        self.path.unlink()

    def complete(
        self, prober: Callable[[Iterable[str | None]], Iterator[VideoFacts | str]], paths: Iterable[str | None]
    ) -> Iterator[VideoFacts | str]:
        """The results of all `paths`: known ones from the journal, then those of `prober`, which are added.

        What could not be read before is tried again: a disk may have been away.
        """
        paths = iter(paths)
        while known := list(islice(self._known(), _READ_AT_ONCE)):
            named = list(islice(paths, len(known)))
            again = prober([path for path, result in zip(named, known, strict=True) if isinstance(result, str)])
            for result in known:
                yield next(again) if isinstance(result, str) else result
        for result in prober(paths):
            self._append(result)
            yield result

    def _known(self) -> Iterator[VideoFacts | str]:
        while self.replaying:
            place = self.file.tell()
            result = self._read_line()
            if result is None:
                self.file.truncate(place)
                self.replaying = False
            else:
                yield VideoFacts(*result) if isinstance(result, list) else result

    def _read_line(self) -> list | str | None:
        """None: there is no whole line."""
        line = self.file.readline()
        try:
            return json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return None

    def _append(self, value: object) -> None:
        self.file.write(json.dumps(value).encode() + b"\n")
        if time.monotonic() - self.flushed > SECONDS_BETWEEN_FLUSHES:
            self.file.flush()
            self.flushed = time.monotonic()
