"""Ends a process that makes no progress, rather than to hold its machines for ever.

A rank that waits for one that will never come, a reader that sleeps, storage that does not answer:
nothing of it raises an error.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from mmssl import dist
from mmssl.types import HUNG

_CHECKS = 20  # looks at the clock per limit
_DUMP_S = 1.0  # what children get to write their stacks


class Watchdog:
    """Wants a `beat` at least every `limit_s` seconds; 0 never bites."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self._last, self._end = limit_s, time.monotonic(), threading.Event()

    def beat(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch the work inside.

        Without a beat in time the stacks of all threads and of all children go to standard error,
        the children are killed and the process exits with `types.HUNG`. A process that is stuck in
        code that does not let go of Python's lock exits with 1 a little later.
        """
        if not self.limit_s:
            yield self
            return
        # Forked readers inherit the handler.
        faulthandler.register(signal.SIGUSR2, file=2)
        self.beat()
        self._end.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause_s = self.limit_s / _CHECKS
        while not self._end.is_set():
            late_s = self.limit_s + 2 * pause_s + _DUMP_S
            faulthandler.dump_traceback_later(late_s, exit=True, file=2)
            if time.monotonic() - self._last > self.limit_s:
                self._bite()
            self._end.wait(pause_s)

    def _bite(self) -> None:
        print(
            f"mmssl: rank {dist.rank()} made no progress in {self.limit_s:.0f} s (train.hang_s) "
            "and ends; the stacks of all threads and child processes follow",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True, file=2)
        children = psutil.Process().children(recursive=True)
        for number in (signal.SIGUSR2, signal.SIGKILL):
            for child in children:
                with suppress(psutil.Error):  # it may be gone
                    child.send_signal(number)
            time.sleep(_DUMP_S)
        os._exit(HUNG)
