"""torchrun for runs that may be preempted.

    python -m mmssl.launch --nproc-per-node 8 -m mmssl.cli train FILE [key=value ...]

Takes torchrun's arguments. torchrun itself dies of SIGUSR1, kills its processes 30 s after a
SIGTERM, and ends with 1 whatever they ended with. Here both signals go to the processes, which save
a checkpoint in their own time, and the exit code is that of the process which failed first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mmssl.signals import heard_by, pass_on
from mmssl.types import PREEMPTED

OTHERS = "SIGINT,SIGHUP,SIGQUIT"  # remain torchrun's: they end everything


def main(words: Sequence[str]) -> int:
    """Run torchrun; returns 0, the code of the first failure, or 128 + the signal it died of."""
    with heard_by(_pass_on):
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            run.main(["--signals-to-handle", OTHERS, *words])
        except ChildFailedError as error:
            print(error, file=sys.stderr)
            code = error.get_first_failure()[1].exitcode
            return code if code > 0 else 128 - code
    return 0


def _pass_on(number: int) -> None:
    if not pass_on(number):  # the nodes have not met yet: nothing to save
        os._exit(PREEMPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
