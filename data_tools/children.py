"""Worker processes that may hang, crash or run out of memory: each ends one task, not the run.

They are started fresh, import what the work needs and nothing of the caller's main module, and end
with their parent. A process has one task at a time, so it is known which one ended it. This
protects against accidents; it is no sandbox.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from mmssl.data.confine import confine, out_of_memory, stuck, worked_s
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import UserError

_SERVE = "import sys; sys.path[:] = {}; from data_tools.children import serve; serve({}, {})"
_AHEAD = 4  # results per worker that may wait for an earlier task

Work = Callable[[Any], Any]


class Child:
    """One process that calls `work`, a function or `partial` that it can import.

    Give it a task, wait for its `pipe` or for `left_s`, then take what came of the task.
    """

    def __init__(self, work: Work, seconds: float, megabytes: int) -> None:
        """Set the limits of a task; megabytes: address space beyond what imports take."""
        self._work, self._seconds, self._megabytes = work, seconds, megabytes
        self._process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None

    def give(self, task: Any) -> None:
        """Start a task; take its result before giving the next."""
        self._task, self._tries = task, 0
        self._send()

    def _send(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        assert self.pipe is not None
        self._tries += 1
        self._due = time.monotonic() + self._seconds
        with suppress(OSError, psutil.NoSuchProcess):  # it died just now: `take` will find out
            self._since_s = worked_s(self._watched)
            self.pipe.send(self._task)

    @property
    def left_s(self) -> float:
        """Seconds until the task must be looked at; 0 when they are over."""
        return max(0.0, self._due - time.monotonic())

    def take(self) -> tuple[bool, Any]:
        """Whether the task has ended, and its result or the `DamagedSampleError` instead of it.

        The reason is what `work` raised, `error` for other exceptions, `timeout`, `memory`, or
        `crash`. A process that died is replaced and the task tried once more, for the cause may
        have been another: an interrupted disk, or the kernel in search of memory.

        Raises:
            UserError: what `work` raised.
        """
        assert self.pipe is not None
        if not self.pipe.poll():
            return self._late()
        try:
            reason, value = self.pipe.recv()
        except (EOFError, OSError):
            status = self.close()
            if self._tries == 1:
                self._send()
                return False, None
            killed = status == -signal.SIGKILL  # by the kernel: none of ours
            text = f"the worker process ended with status {status}, twice"
            return True, DamagedSampleError("memory" if killed else "crash", text)
        if reason == "settings":
            raise UserError(value)
        if reason == "memory":  # nobody knows what is left of the heap
            self.close()
            value = f"needs more than {self._megabytes} MB"
        return True, DamagedSampleError(reason, value) if reason else value

    def _late(self) -> tuple[bool, Any]:
        if self.left_s:
            return False, None
        if not stuck(self._watched, self._since_s, self._seconds):
            self._due += self._seconds
            return False, None
        self.close()
        return True, DamagedSampleError("timeout", f"not done within {self._seconds:g} s")

    def __call__(self, task: Any) -> Any:
        """The result of a task, or the error instead of it; see `take`."""
        self.give(task)
        ended, result = False, None
        while not ended:
            assert self.pipe is not None
            self.pipe.poll(self.left_s)
            ended, result = self.take()
        return result

    def close(self) -> int:
        """Kill the process; returns its exit status, negative for a signal."""
        if self._process is None or self.pipe is None:
            return 0
        self.pipe.close()
        self._process.kill()
        status = self._process.wait()
        self._process = self.pipe = None
        return status

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        code = _SERVE.format(sys.path, theirs.fileno(), os.getpid())
        with theirs:
            command = [sys.executable, "-c", code]
            fds = (theirs.fileno(),)
            self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        self._watched = psutil.Process(self._process.pid)
        self.pipe = Connection(ours.detach())
        with suppress(OSError):
            self.pipe.send((self._work, self._megabytes))


def serve(descriptor: int, parent: int) -> None:
    """In the child: answer tasks until the parent closes its end."""
    pipe = Connection(descriptor)
    with suppress(EOFError, OSError):  # the parent closed its end, or was killed
        work, megabytes = pipe.recv()
        if not confine(parent, megabytes << 20):
            return
        gc.freeze()
        while True:
            answer = _answer(work, pipe.recv())
            try:
                pipe.send(answer)
            except MemoryError:
                pipe.send(("memory", ""))


def _answer(work: Work, task: Any) -> tuple[str, Any]:
    """("", result), or the reason and message of a task that failed."""
    try:
        return "", work(task)
    except UserError as error:
        return "settings", str(error)
    except Exception as error:  # counted by the parent
        if out_of_memory(error):
            return "memory", ""
        if isinstance(error, DamagedSampleError):
            return error.reason, str(error)
        return "error", f"{type(error).__name__}: {error}"


def ordered(
    work: Work, tasks: Iterable[Any], workers: int, seconds: float, megabytes: int
) -> Iterator[Any]:
    """Results, or the `DamagedSampleError` in their place, in the order of the tasks.

    Raises:
        UserError: what `work` raised.
    """
    idle = [Child(work, seconds, megabytes) for _ in range(workers)]
    busy: dict[Child, int] = {}
    done: dict[int, Any] = {}
    rest, given, taken = iter(tasks), 0, 0
    try:
        while True:
            while idle and given - taken < _AHEAD * workers:
                try:
                    task = next(rest)
                except StopIteration:
                    break
                busy[idle[-1]] = given
                idle.pop().give(task)
                given += 1
            if given == taken:
                return
            while taken in done:
                yield done.pop(taken)
                taken += 1
            for child in _settled(busy):
                ended, result = child.take()
                if ended:
                    done[busy.pop(child)] = result
                    idle.append(child)
    finally:
        for child in [*idle, *busy]:
            child.close()


def _settled(busy: dict[Child, int]) -> list[Child]:
    """Wait until processes have answered, died or run out of time; which ones."""
    pipes = {child.pipe: child for child in busy}
    if not pipes:
        return []
    timeout = min(child.left_s for child in busy)
    ready = set(wait([pipe for pipe in pipes if pipe is not None], timeout))
    return [child for pipe, child in pipes.items() if pipe in ready or not child.left_s]
