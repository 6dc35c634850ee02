"""R9: a request leaves an evaluation, too; all other moments are in `preemptions`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "dist"))

from launching import TEST_LIMIT_S, finish, start_ranks, wait_until
from test_resume_exact import SCRIPT, compare
from toy_run import run

from mmssl.train import checkpoint, preempt
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session
from mmssl.types import PREEMPTED


def test_a_request_leaves_an_evaluation_and_it_is_made_up_for(tmp_path: Path) -> None:
    train = {"steps": 4, "save_every": 2}
    with preempt.StopRequest().listening(), session() as device:
        settings = {"validate": {"every": 2, "metric": "weight"}, "train": train}
        run(device, str(tmp_path / "whole"), **settings)
        timer = threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        progress = run(device, str(tmp_path / "part"), evaluate_s=60.0, **settings)
        assert time.monotonic() - began < 50
        timer.join()
        assert progress is not None
        assert (progress.step, progress.evaluated, progress.stopped) == (2, 0, preempt.REASON)
        assert checkpoint.newest(tmp_path / "part") is not None
        assert not (tmp_path / "part" / "best").exists()
        run(device, str(tmp_path / "part"), **settings)
    compare(tmp_path / "whole", tmp_path / "part", last=4)
    assert checkpoint.find(tmp_path / "whole").name == checkpoint.find(tmp_path / "part").name


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_one_rank_leaves_the_evaluation_of_all(asked: int, tmp_path: Path) -> None:
    part, whole = tmp_path / "part", tmp_path / "whole"
    call = {"folder": str(part), "train": {"steps": 4}, "validate": {"every": 2}}
    marks = [part / f"evaluating{rank}" for rank in range(2)]
    ranks = start_ranks([SCRIPT, json.dumps([call | {"evaluate_s": 300.0}])], 2)
    wait_until(lambda: all(mark.exists() for mark in marks), "the evaluation does not begin")
    began = time.monotonic()
    ranks[asked].send_signal(signal.SIGTERM)
    ended = finish(*ranks)
    assert [code for code, _ in ended] == [PREEMPTED] * 2, ended
    assert time.monotonic() - began < 30
    newest = checkpoint.newest(part)
    assert newest is not None
    assert read_manifest(newest)["step"] == 2
    assert read_manifest(newest)["progress"]["evaluated"] == 0
    done = finish(*start_ranks([SCRIPT, json.dumps([call, call | {"folder": str(whole)}])], 2))
    assert [code for code, _ in done] == [0, 0], done
    compare(whole, part, last=4)


def test_a_request_after_the_last_step_is_known_to_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmssl.train import run as runs

    monkeypatch.setattr(runs, "_summarise", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with session() as device:
        progress = run(device, str(tmp_path))
        assert progress is not None
        assert (progress.step, progress.stopped) == (6, preempt.REASON)
        monkeypatch.undo()
        progress = run(device, str(tmp_path))
    assert progress is not None
    assert (progress.step, progress.stopped) == (6, "")
