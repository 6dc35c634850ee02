"""Starts the scripts of tests in processes of their own.

On a busy machine a launch that takes half a minute takes several: the limit only ends processes
that wait for each other for ever. Tests that launch carry `pytest.mark.timeout(TEST_LIMIT_S)`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 900.0
TEST_LIMIT_S = 2 * LIMIT_S + 200  # a test launches at most twice one after the other


def settings_of(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a started process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}


def command_line(process: psutil.Process) -> str:
    """Of a process, empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # zombies, too
        return ""


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


# ---------------------------------------------------------------- processes that get signals


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: Sequence[str | Path], **env: str | Path) -> subprocess.Popen[str]:
    """A process in a session of its own, so that it can be ended with all its children."""
    settings = settings_of({name: str(value) for name, value in env.items()})
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, text=True, env=settings, start_new_session=True, **pipes)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit code and output of each; nothing is left running."""
    try:
        said = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def start_ranks(
    words: Sequence[str | Path], count: int, only: Iterable[int] = ()
) -> list[subprocess.Popen[str]]:
    """The ranks of a Python script, or some of them, without a launcher that would end them."""
    env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, *words]
    return [start(command, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in only or range(count)]


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    """Fails with `otherwise` where it takes too long."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def logged(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of the whole lines of a run's log."""
    path = run / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [(x["step"], x["loss"], x["grad_norm"]) for x in lines if "loss" in x]
