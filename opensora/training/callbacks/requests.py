"""A run that is asked to save or to stop: by a signal to any of its ranks, or by a file in its folder.

    SIGUSR1, file `save`            save after the update under way, and go on
    SIGTERM, SIGINT, file `stop`    save after the update under way, and end with exit code 0

The second Ctrl-C ends at once, without saving. A stop ends with 0, because the run did what it was asked: a launcher
that restarts what failed (torchrun --max-restarts) does not restart it.

torchrun forwards SIGTERM, SIGINT, SIGHUP and SIGQUIT to its ranks, and kills them if they are still there after 30 s
(newer ones take --shutdown-timeout); SIGUSR1 ends it. Where a save may take longer, use the files, or signal a rank.

SIGTERM and SIGUSR1 that come while the run is built are answered after its first update. Ctrl-C ends it then at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from opensora.common import get_logger
from opensora.training.callbacks.base import Callback
from opensora.training.state import UpdateMetrics

SAVE_FILE, STOP_FILE = "save", "stop"
_STOPS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C may come twice at once, from the terminal and from a launcher that hands it on.
_SAME_CTRL_C_S = 1.0


class Requests(Callback):
    """Collects what this rank is asked for; the trainer sums it over the ranks and tells what all agree on.

    Signals are collected until `close`, from the moment that it is made on. To be the last callback: a file is removed
    when what it asked for is done, which of a save is when it is published.

    Attributes:
        save, stop: whether the ranks agreed, in the last update, to do so.
    """

    def __init__(self):
        self._files: dict[str, Path] = {}
        self._asked: set[str] = set()
        self._seen: list[Path] = []  # files that an agreement was about
        self._interrupted_at: float | None = None
        self._handlers: dict[signal.Signals, object] = {}
        self.save = self.stop = False
        self._listen_to(signal.SIGTERM, signal.SIGUSR1)

    def look_for_files(self, run_folder: Path) -> None:
        """Take the files `save` and `stop` in the run's folder too; for one rank to call."""
        self._files = {name: run_folder / name for name in (SAVE_FILE, STOP_FILE)}

    def on_start(self, trainer) -> None:
        self._listen_to(signal.SIGINT)

    def take(self) -> tuple[bool, bool]:
        """(save, stop): what this rank was asked for since it was last taken."""
        asked, self._asked = self._asked, set()  # a signal in between is in one or the other
        found = {name: path for name, path in self._files.items() if path not in self._seen and path.exists()}
        self._seen += found.values()
        asked |= set(found)
        return SAVE_FILE in asked, STOP_FILE in asked

    def agree(self, save: float, stop: float) -> None:
        """Take the number of ranks that were asked for each as what all do after this update."""
        self.save, self.stop = save > 0, stop > 0

    def on_update(self, trainer, metrics: UpdateMetrics) -> None:
        if self.stop:
            done = f"{metrics.step} of {trainer.total_updates} updates"
            get_logger().info(f"asked to stop (by a signal or the file '{STOP_FILE}'): stopping after {done}")
        elif not trainer.checkpointer.saving:
            self._remove(self._seen)
            self._seen = []

    def on_end(self, trainer) -> None:
        trainer.checkpointer.wait()
        self._remove(self._files.values())  # one that came during the last update would stop the next run

    def close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _listen_to(self, *numbers: signal.Signals) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread alone
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell does to what it puts in the background
                self._handlers[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL

    def _remove(self, files: Iterable[Path]) -> None:
        for path in files:
            path.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame) -> None:
        # Only facts are kept here: a log line could wait for what the interrupted code holds.
        self._asked.add(STOP_FILE if number in _STOPS else SAVE_FILE)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is not None and now - self._interrupted_at > _SAME_CTRL_C_S:
            raise KeyboardInterrupt
        self._interrupted_at = self._interrupted_at or now
