"""`mmssl doctor`: does everything this package stands on work on this machine?

Every part is tried in a process of its own on samples made on the spot, so that a native library
that crashes, hangs or floods the terminal becomes one line: what failed, its cause, what to do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "missing", "failed"]


@dataclass(frozen=True)
class Finding:
    """What one probe found: the version or the cause, and the remedy where one is needed."""

    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A probe by name. `required`: mmssl cannot train and evaluate without it."""

    name: str
    required: bool
    seconds: float = 120.0


CHECKS = (
    Check("device", required=True),
    Check("pyav", required=True),
    Check("decord", required=False),
    Check("torchcodec", required=False),
    Check("ffmpeg", required=False),
    Check("deepspeed", required=True),
    Check("energon", required=True),
    Check("faiss", required=True),
    Check("sentencepiece", required=True),
)

# first word of the probe's answer line: libraries print to the same stream
ANSWER = "mmssl-doctor:"


def main() -> int:
    """Run all checks, one printed line each; 1 if a required one is not ok."""
    print(f"Python {sys.version.split()[0]} on {sys.platform}, {sys.executable}")
    broken = 0
    with tempfile.TemporaryDirectory(prefix="mmssl-doctor-") as folder:
        for check in CHECKS:
            finding = examine(check, Path(folder))
            broken += check.required and finding.status != "ok"
            print(line(check, finding), flush=True)
    print(f"{broken} required part(s) not working" if broken else "all required parts work")
    return 1 if broken else 0


def line(check: Check, finding: Finding) -> str:
    """`name  status  detail`, and the remedy on a second line."""
    need = "" if check.required or finding.status == "ok" else " (optional)"
    text = f"{check.name:<14} {finding.status:<8}{finding.detail}{need}"
    return f"{text}\n{'':<14} -> {finding.remedy}" if finding.remedy else text


def examine(check: Check, folder: Path) -> Finding:
    """Run one probe in its own process."""
    command = [sys.executable, "-m", "mmssl.doctor", check.name, str(folder)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=check.seconds,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "failed", f"no answer within {check.seconds:.0f} s", "is the machine overloaded?"
        )
    answers = [t for t in done.stdout.splitlines() if t.startswith(ANSWER)]
    if done.returncode == 0 and answers:
        return Finding(**json.loads(answers[-1].removeprefix(ANSWER)))
    return Finding(
        "failed", _death(done.returncode, done.stderr), f"run `{' '.join(command)}` to see all"
    )


def _death(code: int, stderr: str) -> str:
    lines = [t for t in stderr.splitlines() if t.strip()]
    last = lines[-1].strip() if lines else "nothing printed"
    cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"the process ended with {cause}: {last}"
