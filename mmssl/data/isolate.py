"""Decoding in a child process: a decoder that hangs, crashes or eats memory ends a clip, not a run.

FFmpeg cannot be interrupted from Python. Each process that reads has one child, forked from it when
the first sample comes and again after it was killed; bytes go in and rows come back through
memory that both share. It protects against accidents; it is no sandbox, it has its parent's rights.
It costs 1.12 times the processor time of decoding in place (clips of the flagship).
"""

from __future__ import annotations

import copyreg
import gc
import io
import mmap
import os
import pickle
import select
import signal
import socket
import struct
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import psutil
import torch

from mmssl.data.collate import Item
from mmssl.data.confine import confine, out_of_memory, stuck, worked_s
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import Sample, UserError


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
            _send(self._socket, self._memory, sample)
            self._wait()
            reason, value = _receive(self._socket, self._memory)
        except MemoryError as error:
            raise DamagedSampleError(
                "memory", f"{sample.key}: larger than data.decode_mb = {self._bytes >> 20}"
            ) from error
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

    def _wait(self) -> None:
        """Until the answer comes.

        Raises:
            TimeoutError: the time is over, see `stuck`.
        """
        assert self._socket is not None
        process = psutil.Process(self._child)
        since = worked_s(process)
        while not select.select([self._socket], [], [], self._seconds)[0]:
            if stuck(process, since, self._seconds):
                raise TimeoutError

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
        self._memory = mmap.mmap(-1, self._bytes)  # costs what is written to it
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
        self._socket, self._owner, self._child = ours, parent, child

    def _serve(self, pipe: socket.socket, parent: int) -> None:
        if not confine(parent, self._bytes):
            return
        gc.freeze()  # collections would copy the pages shared with the parent
        torch.set_num_threads(1)
        answer: tuple[str, Any] = ("", None)
        while answer[0] != "memory":  # after that, nobody knows what is left of the heap
            try:
                sample = _receive(pipe, self._memory)
            except EOFError:
                return
            answer = self._answer(sample)
            try:
                _send(pipe, self._memory, answer)
            except MemoryError:
                answer = self._too_much(sample)
                _send(pipe, self._memory, answer)

    def _answer(self, sample: Sample) -> tuple[str, Any]:
        """(reason, message) of a sample that must be skipped, ("", row) of any other."""
        try:
            return "", self._work(sample)
        except UserError as error:
            return "settings", str(error)
        except Exception as error:  # sent to the parent, which counts it
            damage = error if isinstance(error, DamagedSampleError) else None
            text = str(error) if damage else f"{type(error).__name__}: {error}"
            if out_of_memory(error):
                return self._too_much(sample)
            return (damage.reason if damage else "error"), text

    def _too_much(self, sample: Sample) -> tuple[str, Any]:
        return "memory", f"{sample.key}: needs more than data.decode_mb = {self._bytes >> 20}"


# --- objects through shared memory, tensors without being pickled


def _array(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)


_REDUCERS = copyreg.dispatch_table | {torch.Tensor: _array}


def _send(pipe: socket.socket, memory: mmap.mmap, value: Any) -> None:
    """Lay a value out in the shared memory, and say how long its parts are.

    Raises:
        MemoryError: it does not fit.
    """
    arrays: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=arrays.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    parts = [file.getbuffer(), *(array.raw() for array in arrays)]
    place = 0
    for part in parts:
        if place + part.nbytes > len(memory):
            raise MemoryError
        memory[place : place + part.nbytes] = part
        place += part.nbytes
    pipe.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))


def _receive(pipe: socket.socket, memory: mmap.mmap) -> Any:
    (count,) = struct.unpack("<Q", _read(pipe, 8))
    sizes = struct.unpack(f"<{count}Q", _read(pipe, 8 * count))
    ends = list(accumulate(sizes))
    with memoryview(memory) as view:
        parts = [bytearray(view[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return pickle.loads(parts[0], buffers=parts[1:])


def _read(pipe: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = pipe.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
