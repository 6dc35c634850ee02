"""Requests to stop: SIGTERM or SIGUSR1 end a run at the next step, after a checkpoint.

Schedulers send one of them ahead of taking the machine away. The process then exits with
`types.PREEMPTED`, which says: all is saved, start the same command again.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from mmssl import dist
from mmssl.signals import SIGNALS

REASON = "preempted"
_LOOK_S = 0.5
_numbers = itertools.count()  # of the requests, made by all ranks in the same order


class InterruptedWork(BaseException):
    """Work inside `StopRequest.interruptible` was left on a request."""


class StopRequest:
    """Whether this process was asked to stop; the ranks agree on it between two steps."""

    def __init__(self) -> None:
        self.received, self._interruptible = False, False
        self._note = f"mmssl/stop/{next(_numbers)}"

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Signals inside are requests; handlers are put back behind. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python delivers signals to the main thread alone
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            # Forked workers inherit the handler; a signal to the whole group must not end them
            # before the checkpoint holds their position.
            if os.getpid() != owner:
                return
            self.received = True
            if self._interruptible:
                self._interruptible = False
                raise InterruptedWork

        for number in SIGNALS:
            signal.signal(number, handle)
        others = signal.set_wakeup_fd(-1)  # `mmssl.signals` would end the process
        try:
            yield self
        finally:
            signal.set_wakeup_fd(others)
            for known, handler in before.items():
                signal.signal(known, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Leave the work inside at once on a request to any rank; it must touch nothing that is
        kept, and hold no collective.

        Raises:
            InterruptedWork: a request came, inside or before.
        """
        with self._in_touch():
            self._interruptible = True
            try:
                if self.received:
                    raise InterruptedWork
                yield
            finally:
                self._interruptible = False

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        """Requests to other ranks arrive here inside; those to this one are told behind."""
        over, main = threading.Event(), threading.main_thread()

        def look() -> None:
            while not over.wait(_LOOK_S):
                if dist.posted(self._note):
                    signal.pthread_kill(cast("int", main.ident), SIGNALS[0])
                    return

        thread = threading.Thread(target=look, name="requests", daemon=True)
        if dist.world_size() > 1:
            thread.start()
        try:
            yield
        finally:
            if self.received:
                dist.post(self._note)
            over.set()
            if thread.ident:
                thread.join()

    def agreed(self) -> bool:
        """True on every rank as soon as one of them has been asked; a collective."""
        return dist.any_rank(self.received)
