"""`mmssl chaos`: inject the faults that training is to survive, on one's own machine.

The suites are part of the source (`tests/faults`), not of the wheel.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mmssl import __version__
from mmssl.eval.options import parse
from mmssl.specs import Spec
from mmssl.types import UserError

SOURCE = Path(__file__).parents[1]


class ChaosOptions(Spec):
    """Words of the command line."""

    suites: str = ""  # names with commas between; empty = all
    count: int = Field(0, ge=0)  # of faults per suite; 0 = the full one
    seed: int = 0


def main(words: Sequence[str] = ()) -> int:
    """Run the suites; returns 0 where all guarantees held. The table is tests/faults/report.md.

    Raises:
        UserError: this is no checkout of the source; a bad option.
    """
    options = parse(ChaosOptions, words)
    if not (SOURCE / "tests" / "faults" / "__main__.py").is_file():
        raise UserError(
            f"chaos: the faults are injected by tests/faults of the source, which {SOURCE} lacks: "
            f"unpack the source of mmssl {__version__} on the machine in question, install it "
            "there with pip install -e '.[dev]', and call `mmssl chaos` again"
        )
    numbers = [f"--count={options.count}", f"--seed={options.seed}"]
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        *filter(None, options.suites.split(",")),
        *numbers,
    ]
    return subprocess.run(command, cwd=SOURCE, check=False).returncode
