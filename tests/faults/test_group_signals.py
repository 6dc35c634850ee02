"""R9 for the command itself: signals to all its processes, and before the training listens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import TEST_LIMIT_S, finish, logged, start, start_ranks, wait_until
from safetensors.torch import load_file
from tiny_run import sound_run
from tone_shards import SCORES, write_tones
from torch import equal

from mmssl.train import checkpoint
from mmssl.train.commit import read_manifest
from mmssl.types import PREEMPTED
from mmssl.yamlfile import write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]

STEPS = 60


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Trains on sound that forked workers read, with forked decoders of their own."""
    folder = tmp_path_factory.mktemp("tones")
    shards = write_tones(folder / "corpus", SCORES * 2)
    tree = sound_run(str(shards), {"steps": STEPS}, workers=2)
    (folder / "run.yaml").write_text(write_yaml(tree))
    return [sys.executable, "-m", "mmssl.cli", "train", str(folder / "run.yaml")]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    ((code, said),) = finish(start([*command, f"out={out}"]))
    assert code == 0, said
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_process_group_costs_no_step_and_no_sample(
    number: signal.Signals, command: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        before = len(logged(out))
        process = start([*command, f"out={out}"])
        wait_until(lambda n=before: len(logged(out)) >= n + 3, "the training does not start")
        os.killpg(process.pid, number)
        ((code, said),) = finish(process)
        assert code == PREEMPTED, said
        newest = checkpoint.newest(out)
        assert newest is not None
        assert read_manifest(newest)["step"] == len(logged(out)) < STEPS
        assert "data worker" not in said
    ((code, said),) = finish(start([*command, f"out={out}"]))
    assert code == 0, said
    assert [step for step, *_ in logged(out)] == list(range(1, STEPS + 1))
    assert logged(out) == logged(undisturbed)
    ours, theirs = (
        load_file(checkpoint.find(x) / "weights.safetensors") for x in (out, undisturbed)
    )
    assert ours.keys() == theirs.keys()
    assert all(equal(ours[name], theirs[name]) for name in ours)
    for name in ("quarantine.jsonl", "skipped.jsonl"):
        assert not (out / name).exists() or not (out / name).read_text(), name


def test_what_kills_the_process_group_leaves_no_reader(command: list[str], tmp_path: Path) -> None:
    process = start([*command, f"out={tmp_path / 'run'}"])
    wait_until(lambda: len(logged(tmp_path / "run")) >= 3, "the training does not start")
    readers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process)[0][0] == -signal.SIGKILL
    assert len(readers) == 4  # two and their decoders
    assert psutil.wait_procs(readers, timeout=10)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_at_the_start_is_answered_though_nothing_is_saved_yet(
    number: signal.Signals, command: list[str], tmp_path: Path
) -> None:
    """While it imports, and while rank 0 waits for another in code that runs no Python."""
    words = [*command[1:], f"out={tmp_path / 'run'}"]

    def importing(process: subprocess.Popen[str]) -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line[:7] == "SigCgt:")
        return bool(int(caught, 16) >> (number - 1) & 1)

    def waiting(process: subprocess.Popen[str]) -> bool:
        found = psutil.Process(process.pid).net_connections()
        return any(connection.status == psutil.CONN_LISTEN for connection in found)

    for moment in (importing, waiting):
        process = start_ranks(words, 2, only=[0])[0]
        wait_until(lambda p=process, reached=moment: reached(p), f"not {moment.__name__}")
        process.send_signal(number)
        began = time.monotonic()
        assert finish(process) == [(PREEMPTED, "mmssl: asked to stop; the same command goes on\n")]
        assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()
