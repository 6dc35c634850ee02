"""`mmssl chaos` runs the suites of a checkout, and says where they are where there is none."""

import subprocess
import sys

import pytest

from mmssl import chaos
from mmssl.types import UserError


def test_a_checkout_runs_its_suites(monkeypatch):
    seen = []

    def run(command, cwd, check):
        seen.append((command, cwd))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(chaos.subprocess, "run", run)
    assert chaos.main(["suites=kills,shards", "count=3", "seed=7"]) == 1
    words = ["-m", "tests.faults", "kills", "shards", "--count=3", "--seed=7"]
    assert seen == [([sys.executable, *words], chaos.SOURCE)]
    assert (chaos.SOURCE / "tests" / "faults" / "__main__.py").is_file()


def test_a_wheel_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(chaos, "SOURCE", tmp_path)
    with pytest.raises(UserError, match=r"unpack the source of mmssl .* pip install -e"):
        chaos.main()
