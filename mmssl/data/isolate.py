"""Decoding in a child process: a decoder that hangs, crashes or eats memory ends a clip, not a run.

FFmpeg cannot be interrupted from Python. Each process that reads has one child, forked from it when
the first sample comes and again after it was killed; bytes go in and rows come back through a
socket. The child protects against accidents; it is no sandbox, it has its parent's rights.
"""

from __future__ import annotations

import copyreg
import ctypes
import gc
import io
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch

from mmssl.data.collate import Item
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import Sample, UserError

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the parent's business
_FATAL = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


class DecodeChild:
    """Calls `work` in a child process, within a time and a memory limit."""

    def __init__(self, work: Callable[[Sample], Item], seconds: float, megabytes: int) -> None:
        """Set the limits; megabytes: address space beyond what the child starts with."""
        self._work, self._seconds, self._bytes = work, seconds, megabytes << 20
        self._owner = self._child = 0
        self._socket: socket.socket | None = None

    def __call__(self, sample: Sample) -> Item:
        """The row of a sample.

        Raises:
            DamagedSampleError: what `work` raised, or `timeout`, `memory` or `crash`, after which
                the child was replaced.
            UserError: what `work` raised.
        """
        if self._owner != os.getpid():  # no child yet, or it is that of the process we left
            self._start()
        assert self._socket is not None
        try:
            _send(self._socket, sample)
            reason, value = _receive(self._socket)
        except TimeoutError as error:
            self.close()
            raise DamagedSampleError(
                "timeout", f"{sample.key}: not decoded within {self._seconds:g} s"
            ) from error
        except (OSError, EOFError) as error:
            status = self.close()
            raise DamagedSampleError(
                "crash", f"{sample.key}: the decoding process ended with status {status}"
            ) from error
        except BaseException:  # interrupted: the answer that is still to come is no one's
            self.close()
            raise
        if reason == "memory":
            self.close()
        if reason == "settings":
            raise UserError(value)
        if reason:
            raise DamagedSampleError(reason, value)
        item: Item = value
        return item

    def close(self) -> int:
        """Kill the child; returns its exit status, negative for a signal."""
        if self._socket is None or self._owner != os.getpid():
            return 0
        self._socket.close()
        self._socket, self._owner = None, 0
        os.kill(self._child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])

    def _start(self) -> None:
        parent, (ours, theirs) = os.getpid(), socket.socketpair()
        child = os.fork()  # multiprocessing forbids it to the workers of a loader
        if child == 0:
            status = 1
            try:
                ours.close()
                self._serve(theirs, parent)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        ours.settimeout(self._seconds)
        self._socket, self._owner, self._child = ours, parent, child

    def _serve(self, pipe: socket.socket, parent: int) -> None:
        if sys.platform == "linux":  # elsewhere the limit of time must do
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = psutil.Process().memory_info().vms + self._bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if os.getppid() != parent:
            return
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        for number in _FATAL:
            signal.signal(number, signal.SIG_DFL)
        gc.freeze()  # collections would copy the pages shared with the parent
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        answer: tuple[str, Any] = ("", None)
        while answer[0] != "memory":  # after that, nobody knows what is left of the heap
            try:
                sample = _receive(pipe)
            except EOFError:
                return
            answer = self._answer(sample)
            _send(pipe, answer)

    def _answer(self, sample: Sample) -> tuple[str, Any]:
        """(reason, message) of a sample that must be skipped, ("", row) of any other."""
        try:
            return "", self._work(sample)
        except UserError as error:
            return "settings", str(error)
        except Exception as error:  # sent to the parent, which counts it
            damage = error if isinstance(error, DamagedSampleError) else None
            text = str(error) if damage else f"{type(error).__name__}: {error}"
            if isinstance(error.__cause__ or error, MemoryError) or "allocate memory" in text:
                limit = f"{self._bytes >> 20} MB beyond the start"
                return "memory", f"{sample.key}: decoding needs more than {limit}"
            return (damage.reason if damage else "error"), text


# --- objects through a socket, big arrays without copies


def _array(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)


_REDUCERS = copyreg.dispatch_table | {torch.Tensor: _array}


def _send(pipe: socket.socket, value: Any) -> None:
    arrays: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=arrays.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    parts = [file.getbuffer(), *(array.raw() for array in arrays)]
    pipe.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        pipe.sendall(part)


def _receive(pipe: socket.socket) -> Any:
    (count,) = struct.unpack("<Q", _bytes(pipe, 8))
    sizes = struct.unpack(f"<{count}Q", _bytes(pipe, 8 * count))
    parts = [_bytes(pipe, size) for size in sizes]
    return pickle.loads(parts[0], buffers=parts[1:])


def _bytes(pipe: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        got = pipe.recv_into(rest)
        if not got:
            raise EOFError
        rest = rest[got:]
    return data
