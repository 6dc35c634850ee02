"""The processes of a loader: which of them died, and over which sample."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import get_worker_info

from mmssl.data.confine import die_with_parent

_SLOT = 256  # bytes; keys have at most 200
_LATE_S = 1.0  # what a dying process leaves behind may be seen before its end is


class InFlight:
    """The sample each worker is at, in memory that outlives the worker."""

    def __init__(self, workers: int) -> None:
        """Make room; to be called before the workers are forked."""
        self._memory = mmap.mmap(-1, max(1, workers) * _SLOT)

    def put(self, key: str) -> None:
        """Note what this process is at; empty for nothing."""
        info = get_worker_info()
        start = _SLOT * (info.id if info else 0)
        self._memory[start : start + _SLOT] = key.encode()[:_SLOT].ljust(_SLOT, b"\0")

    def take(self, worker: int) -> str:
        """What a dead worker was at; it is forgotten."""
        place = slice(_SLOT * worker, _SLOT * (worker + 1))
        key, self._memory[place] = self._memory[place], bytes(_SLOT)
        return key.rstrip(b"\0").decode(errors="replace")


def apart(init: Callable[[int], None] | None, worker: int) -> None:
    """First thing in a worker: a process group of its own.

    A request to stop that is sent to the run's group would end workers, and their place would have
    to be read up to anew before the checkpoint. What kills the group kills the parent, and thereby
    them: torch's loop would wait for ever to hand over batches that no one takes.
    """
    if sys.platform == "linux":
        die_with_parent()
        os.setpgid(0, 0)
    if init is not None:
        init(worker)


def dead(loader: Any) -> list[int]:
    """Numbers of the workers of torch's loader that ended before their time."""
    processes = getattr(getattr(loader, "_iterator", None), "_workers", [])
    until = time.monotonic() + _LATE_S
    while True:
        found = [i for i, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if found or not processes or time.monotonic() > until:
            return found
        time.sleep(0.02)


def guilty(loader: Any, dead: Sequence[int]) -> list[int]:
    """Those of the dead that were not asked to end: a SIGTERM to all processes says nothing of the
    sample a worker was at.
    """
    processes = loader._iterator._workers
    return [number for number in dead if processes[number].exitcode != -signal.SIGTERM]


def watch(loader: Any) -> None:
    """After the first batch: let the death of a worker show where a batch or state is asked for.

    torch raises it wherever the main thread happens to be, in the middle of a training step;
    without that, waiting for a batch notices it within five seconds. Energon would wait for a dead
    worker's state for ever.
    """
    if getattr(signal.getsignal(signal.SIGCHLD), "__module__", "").startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    loader.result_queues = [_Patient(answers, loader) for answers in loader.result_queues]


class _Patient:
    """A queue whose `get` gives up when a worker has died."""

    def __init__(self, answers: Any, loader: Any) -> None:
        self._answers, self._loader = answers, loader

    def get(self) -> Any:
        while True:
            try:
                return self._answers.get(timeout=_LATE_S)
            except queue.Empty:
                if dead(self._loader):
                    raise RuntimeError("a data worker died") from None
