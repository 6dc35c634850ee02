"""Processes end cleanly, and training needs no compiler."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import TEST_LIMIT_S, finish, run_script, start_ranks

SCRIPT = Path(__file__).with_name("toy_run.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]


def start(folder: Path, processes: int, **env: str) -> subprocess.CompletedProcess[str]:
    calls = [{"folder": str(folder), "train": {"steps": 2, "zero": 2}}]
    return run_script([SCRIPT, json.dumps(calls)], processes, env)


def test_two_process_runs_in_a_row_end_with_zero(tmp_path: Path) -> None:
    codes = [start(tmp_path / str(i), 2).returncode for i in range(2)]
    assert codes == [0, 0]


def test_training_needs_no_compiler_and_keeps_the_console_clean(tmp_path: Path) -> None:
    # An empty build folder: nothing compiled earlier can help.
    done = start(
        tmp_path / "run", 1, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "build")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "build").exists()
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["toy:", "step", "step", "done,"]


def test_a_log_that_cannot_be_opened_ends_all_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.mkdir()
    ended = finish(*start_ranks([SCRIPT, json.dumps([{"folder": str(tmp_path)}])], 2))
    for code, said in ended:
        assert code == 1, said
        assert f"IsADirectoryError: [Errno 21] Is a directory: '{log}'" in said
