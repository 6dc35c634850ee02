"""SIGTERM and SIGUSR1 at moments at which the main thread may be deaf.

Python runs handlers there alone, and not while C++ waits for other ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from mmssl.types import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def heard_by(act: Callable[[int], object]) -> Iterator[None]:
    """Inside, a thread calls `act` with the number of each signal. Main thread only.

    Not inside `preempt.StopRequest.listening`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    hear, tell = os.pipe()
    os.set_blocking(tell, False)

    def listen() -> None:
        while read := os.read(hear, 1):
            if read[0] in SIGNALS:
                act(read[0])
        os.close(hear)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    known = signal.set_wakeup_fd(tell)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(known)
        os.close(tell)


def pass_on(number: int) -> int:
    """Send a signal to the child processes; returns how many there are."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.Error):  # it may be gone
            child.send_signal(number)
    return len(children)


def leave(number: int = signal.SIGTERM) -> NoReturn:
    """End this process and its children, as nothing is at work that a checkpoint would save."""
    pass_on(number)
    print("mmssl: asked to stop; the same command goes on", file=sys.stderr, flush=True)
    os._exit(PREEMPTED)
