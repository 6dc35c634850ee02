"""R9: a request leaves an evaluation, too; all other moments are in `preemptions`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "dist"))

from test_resume_exact import compare
from toy_run import run

from mmssl.train import checkpoint, preempt
from mmssl.train.engine import session


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
