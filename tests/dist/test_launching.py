"""The launcher of these tests: limits, messages, environment."""

from pathlib import Path

import pytest
from launching import ROOT, checked, run_script


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(
        "import os, sys, time\n"
        "print(os.environ['PYTHONPATH'], os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "sys.exit('went wrong' if len(sys.argv) > 2 else 0)\n"
    )
    return path


def test_what_a_script_prints_and_its_environment(script: Path) -> None:
    assert checked([script, "0"]).split() == [str(ROOT), "1"]
    assert run_script([script, "0"], env={"OMP_NUM_THREADS": "2"}).stdout.split()[1] == "2"


def test_a_failing_script_fails_the_test_with_its_words(script: Path) -> None:
    with pytest.raises(AssertionError, match="went wrong"):
        checked([script, "0", "fail"])


def test_a_script_without_end_is_stopped_and_named(script: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no end within 1 s \(load") as caught:
        run_script([script, "60"], limit_s=1)
    assert "too busy" in str(caught.value)
