"""Limits of a process whose code may hang, crash or eat memory; free of torch."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path

import psutil

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the parent's business
_FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends. Linux only."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def confine(parent: int, size: int) -> bool:
    """Bind this process to its parent and to `size` bytes beyond what it has; False: it is gone."""
    if sys.platform == "linux":  # elsewhere the limit of time must do
        die_with_parent()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    for number in _FATAL:
        signal.signal(number, signal.SIG_DFL)
    return os.getppid() == parent


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or FFmpeg found no memory."""
    lacking = isinstance(error.__cause__ or error, MemoryError)
    return lacking or "allocate memory" in str(error)


def peak_mb() -> int:
    """Most memory that this process has had, in MB; 0 where the system does not tell.

    `ru_maxrss` would count what the parent had when it started this process.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) >> 10 if found else 0


def worked_s(process: psutil.Process) -> float:
    """Processor seconds of a process."""
    return float(sum(process.cpu_times()[:2]))


def stuck(process: psutil.Process, since_s: float, seconds: float) -> bool:
    """Whether time is over for a process that had worked `since_s` when its task began.

    One that a busy machine keeps from running gets more, until it has worked for half of its time.
    """
    if process.status() != psutil.STATUS_RUNNING:
        return True
    return worked_s(process) - since_s > seconds / 2
