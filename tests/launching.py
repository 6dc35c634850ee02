"""Starts the scripts of tests in processes of their own.

On a busy machine a launch that takes half a minute takes several: the limit only ends processes
that wait for each other for ever. Tests that launch carry `pytest.mark.timeout(TEST_LIMIT_S)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 900.0
TEST_LIMIT_S = 2 * LIMIT_S + 200  # a test launches at most twice one after the other


def settings_of(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a started process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}


def run_script(
    words: Sequence[str | Path],
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script with its arguments; several processes are started by torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += map(str, words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=settings_of(env), **pipes) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            said = _end(process)
            load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
            pytest.fail(
                f"no end within {limit_s:.0f} s (load {load} on {os.cpu_count()} cores): the "
                f"processes wait for each other, or the machine is too busy\n{said}"
            )
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def checked(
    words: Sequence[str | Path],
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> str:
    """`run_script` of a script that must succeed; returns what it printed."""
    done = run_script(words, processes, env, limit_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _end(process: subprocess.Popen[str]) -> str:
    """Stop a process; torchrun passes the request on to its workers, which outlive a kill."""
    process.terminate()
    try:
        return "".join(process.communicate(timeout=60))
    except subprocess.TimeoutExpired:
        process.kill()
        return "(it did not react to being terminated)"
