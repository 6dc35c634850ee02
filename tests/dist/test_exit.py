"""Processes end cleanly, and training needs no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT, SCRIPT = Path(__file__).parents[2], Path(__file__).with_name("toy_run.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(
    folder: Path, launcher: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    calls = [{"folder": str(folder), "train": {"steps": 2, "zero": 2}}]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *launcher, str(SCRIPT), json.dumps(calls)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


@pytest.mark.slow
def test_two_process_runs_in_a_row_end_with_zero(tmp_path: Path) -> None:
    codes = [start(tmp_path / str(i), TORCHRUN).returncode for i in range(2)]
    assert codes == [0, 0]


@pytest.mark.slow
def test_training_needs_no_compiler_and_keeps_the_console_clean(tmp_path: Path) -> None:
    # An empty build folder: nothing compiled earlier can help.
    done = start(
        tmp_path / "run", [], PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "build")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "build").exists()
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["toy:", "step", "step", "done,"]
