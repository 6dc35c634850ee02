"""R9: a request to stop costs no step, whenever it comes."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "dist"))

from test_resume_exact import compare
from toy_run import run

from mmssl.train import checkpoint, preempt
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session

STEPS = 24
SETTINGS = {"validate": {"every": 3, "metric": "-weight"}, "pause_s": 0.02, "evaluate_s": 0.05}


class Asker:
    """Sends this process one of the signals at a random moment."""

    def __init__(self, rng: random.Random, within_s: float) -> None:
        self.number, self.asked_at = rng.choice(preempt.SIGNALS), 0.0
        self.timer = threading.Timer(rng.uniform(0, within_s), self._ask)
        self.timer.start()

    def _ask(self) -> None:
        self.asked_at = time.monotonic()
        os.kill(os.getpid(), self.number)


def preemptions(folder: Path, wanted: int, seed: int, stage: int) -> tuple[int, float]:
    """Runs of the toy, stopped at random moments until done, each equal to an undisturbed one.

    Returns how many requests were answered, and the longest time that took.
    """
    rng, answered, longest_s = random.Random(seed), 0, 0.0
    train = {"steps": STEPS, "zero": stage, "save_every": 5, "log_every": 1}
    # signals that come too late for a run end here and not in the test's process
    with preempt.StopRequest().listening(), session() as device:
        run(device, str(folder / "whole"), train=train, **SETTINGS)
        while answered < wanted:
            part, stopped = folder / f"part{answered}", True
            while stopped:
                asker = Asker(rng, 0.6)
                progress = run(device, str(part), train=train, **SETTINGS)
                ended_at = time.monotonic()
                asker.timer.join()
                assert progress is not None
                stopped = progress.stopped == preempt.REASON
                if stopped:
                    newest = checkpoint.newest(part)
                    assert progress.step == (read_manifest(newest)["step"] if newest else 0)
                    answered, longest_s = answered + 1, max(longest_s, ended_at - asker.asked_at)
            compare(folder / "whole", part, last=STEPS)
    return answered, longest_s


@pytest.mark.parametrize("stage", [0, 2])
def test_requests_at_random_moments_cost_no_step(tmp_path: Path, stage: int) -> None:
    answered, longest_s = preemptions(tmp_path, 4, seed=stage, stage=stage)
    assert answered >= 4
    assert longest_s < 30


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
