"""Any program as captioner or speech recogniser: one JSON line in, one JSON line out.

The program is started once per worker, without a shell. For every clip it finds a line on its
standard input

    {"id": 17, "media": "/corpus/clips/dog.mp4", "start": 3.0, "end": 13.0}

(start and end in seconds from the beginning of the file; an end of null is that of the file; media
is a path or, of an object in a storage, its address; where the sound is a file of its own, `sound`
names it, and media may be a list of pictures) and prints one line, flushed, before it gets the next
clip:

    {"id": 17, "captions": ["a dog barks"], "transcript": "hey you", "words": [[3.2, 3.5, "hey"],
     [3.6, 3.9, "you"]], "language": "en"}

All but the id may be missing. `caption` is one caption, `words` have their times in seconds from
the beginning of the file, too; {"id": 17, "error": "why"} says that it cannot do this clip. It ends
when its input ends. What it prints to standard error appears in messages about failures. The
environment variable WORKER has the number of its worker, from 0.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mmssl.types import UserError

_MAX_LINE = 16 << 20  # bytes: an answer that does not end would fill the memory
_TAIL = 2000  # bytes of standard error that are kept
_ATTEMPTS = 2  # of a clip: the second one in a new process, which no earlier clip has damaged
_GRACE_S = 5.0
_MAX_SECONDS = 1e9  # of times in answers


class ClipError(Exception):
    """A clip has no answer; reason: died, hung, order (another clip's), nonsense or refused."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Program:
    """A running program that is asked for one clip at a time, and replaced when it fails."""

    def __init__(
        self, words: Sequence[str], seconds: float, restarts: int, worker: int = 0
    ) -> None:
        """Nothing is started before the first question.

        Args:
            words: the program and its arguments.
            seconds: for an answer, and in the first case for loading, too.
            restarts: how often in a row, without an answer at the first attempt in between.
            worker: its number.
        """
        self._words, self._seconds, self._restarts = list(words), seconds, restarts
        self._environment = {**os.environ, "WORKER": str(worker)}
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._closed = False
        self._lock = threading.Lock()  # of _process and _closed
        self._buffer, self._stderr = bytearray(), b""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The checked answer to a request, which has an `id`.

        Raises:
            ClipError: there is none, at the second attempt either.
            UserError: the program cannot be started, or fails again and again.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = check_answer(request, self._exchange(request))
            except ClipError as error:
                self._stop()
                self._failures += 1
                if self._failures > self._restarts or self._closed:
                    raise UserError(
                        f"{self._words[0]}: failed {self._failures} times in a row, the last time "
                        f"on {request['media']}: {error}"
                    ) from error
                if attempt == _ATTEMPTS:
                    raise
                continue
            if attempt == 1:
                self._failures = 0
            if "error" in answer:
                raise ClipError("refused", answer["error"])
            return answer
        raise AssertionError("unreachable")

    def interrupt(self) -> None:
        """Kill the program, so that a question in another thread fails; it is not started again."""
        with self._lock:
            self._closed = True
            self._kill()

    def close(self) -> None:
        """End the program while nobody waits for an answer: its input ends, and it may tidy up."""
        self._closed = True
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(_GRACE_S)
        self._stop()

    # ---------------------------------------------------------------- the process

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise UserError(f"{self._words[0]}: was interrupted")
            try:
                self._process = subprocess.Popen(
                    self._words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=self._environment,
                    start_new_session=True,  # so that what it starts can be ended with it
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{self._words[0]}: cannot be started ({error})") from error
        self._buffer, self._stderr = bytearray(), b""
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _stop(self) -> None:
        with self._lock:
            self._kill()
            process, self._process = self._process, None
        if process is None:
            return
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with suppress(OSError):  # what was never read
                pipe.close()

    def _exchange(self, request: Mapping[str, Any]) -> bytes:
        process = self._process or self._start()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died: reading tells how
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return self._line(process, time.monotonic() + self._seconds)

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.fileno(), process.stderr.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            selector.register(err, selectors.EVENT_READ)
            end = -1
            while end < 0:
                ready = {key.fd for key, _ in selector.select(max(0, deadline - time.monotonic()))}
                if not ready:
                    raise ClipError("hung", f"no answer within {self._seconds:g} s{self._said()}")
                if err in ready and not self._hear(err):
                    selector.unregister(err)
                if out in ready:
                    chunk = os.read(out, 1 << 16)
                    if not chunk:
                        raise ClipError("died", self._death(process, err))
                    self._buffer += chunk
                    end = self._buffer.find(b"\n", len(self._buffer) - len(chunk))
                if len(self._buffer) > _MAX_LINE:
                    raise ClipError("nonsense", f"a line of more than {_MAX_LINE >> 20} MiB")
        line, rest = bytes(self._buffer[:end]), bytes(self._buffer[end + 1 :])
        self._buffer.clear()
        if rest:
            raise ClipError("order", f"more than one line: {_short(rest)}")
        return line

    def _hear(self, err: int) -> bool:
        """Read standard error once; False at its end."""
        chunk = os.read(err, 1 << 16)
        self._stderr = (self._stderr + chunk)[-_TAIL:]
        return bool(chunk)

    def _death(self, process: subprocess.Popen[bytes], err: int) -> str:
        os.set_blocking(err, False)  # what it started may hold the pipe open
        with suppress(BlockingIOError):
            while self._hear(err):
                pass
        try:
            code = process.wait(min(5.0, self._seconds))
        except subprocess.TimeoutExpired:
            return f"closed its output{self._said()}"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{how}{self._said()}"

    def _said(self) -> str:
        lines = self._stderr.decode(errors="replace").strip().splitlines()
        return f"; it said: {lines[-1][:200]}" if lines else ""


# ---------------------------------------------------------------- answers


def check_answer(request: Mapping[str, Any], line: bytes) -> dict[str, Any]:
    """The fields of an answer: captions, transcript, words, language, error.

    Raises:
        ClipError: it is none, or that of another clip.
    """
    try:
        answer = json.loads(line)
        json.dumps(answer, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise ClipError("nonsense", f"not a line of JSON: {_short(line)}") from error
    if not isinstance(answer, dict) or "id" not in answer:
        raise ClipError("nonsense", f"no JSON object with the clip's id: {_short(line)}")
    if answer.pop("id") != request["id"]:
        raise ClipError("order", f"asked for {request['id']}, answered {_short(line)}")
    if isinstance(answer.get("caption"), str) and "captions" not in answer:
        answer["captions"] = [answer.pop("caption")]
    for key, value in answer.items():
        if key not in _FIELDS or not _FIELDS[key](value):
            raise ClipError("nonsense", f"{key}: {_short(json.dumps(value).encode())}")
    return answer


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(_is_word(word) for word in value)


def _is_word(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], str):
        return False
    times = value[:2]
    return (
        all(isinstance(t, int | float) and not isinstance(t, bool) for t in times)
        and 0 <= times[0] <= times[1] < _MAX_SECONDS
    )


_FIELDS = {
    "captions": _is_texts,
    "transcript": _is_text,
    "words": _is_words,
    "language": _is_text,
    "error": _is_text,
}


def _short(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace"))
