"""torchrun for runs that may be preempted.

    python -m mmssl.launch --nproc-per-node 8 -m mmssl.cli train FILE [key=value ...]

Takes torchrun's arguments. torchrun itself dies of SIGUSR1, kills its processes 30 s after a
SIGTERM, and ends with 1 whatever they ended with. Here both signals go to the processes, which save
a checkpoint in their own time, and the exit code is that of the process which failed first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mmssl.types import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OTHERS = "SIGINT,SIGHUP,SIGQUIT"  # remain torchrun's: they end everything


def main(words: Sequence[str]) -> int:
    """Run torchrun; returns 0, the code of the first failure, or 128 + the signal it died of."""
    _watch_signals()
    try:
        run.main(["--signals-to-handle", OTHERS, *words])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def _watch_signals() -> None:
    """Hear signals on a thread: the main one may wait for other nodes, deaf in C++."""
    hear, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def listen() -> None:
        while True:
            (number,) = os.read(hear, 1)
            if number in SIGNALS:
                _pass_on(number)

    threading.Thread(target=listen, daemon=True).start()


def _pass_on(number: int) -> None:
    children = psutil.Process().children()
    if not children:  # the nodes have not met yet: nothing to save
        os._exit(PREEMPTED)
    for child in children:
        with suppress(psutil.Error):  # it may be gone
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
