"""What worker processes of data tools are asked to do by tests; imports nothing heavy."""

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

from mmssl.data.integrity import DamagedSampleError
from mmssl.types import UserError


def _hang(_):
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, in C, holding the interpreter's lock


def _crash_once(mark):
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(3)


def _fail(error):
    raise error


KINDS = {
    "hang": _hang,
    "crash": lambda _: signal.raise_signal(signal.SIGSEGV),
    "killed": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda _: os._exit(0),
    "crash-once": _crash_once,
    "eat": lambda _: len(bytearray(1 << 30)),
    "damaged": lambda _: _fail(DamagedSampleError("decode", "broken")),
    "settings": lambda _: _fail(UserError("a wrong setting")),
    "error": lambda _: _fail(KeyError("who knows")),
    "sleep": lambda rest: time.sleep(float(rest)),
    "modules": lambda _: sorted(sys.modules),
    "limit": lambda _: resource.getrlimit(resource.RLIMIT_AS)[0],
}


def work(task):
    """What the task's first word says."""
    kind, _, rest = task.partition(" ")
    return (kind in KINDS and KINDS[kind](rest)) or f"{task} done"


def prepare_or_crash(row, options):
    """Instead of `prepare`: some sources are fatal."""
    from data_tools.shard_rows import prepare

    work(row.source)
    return prepare(row, options)
