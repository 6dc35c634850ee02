"""R9: a request to stop costs no step, whenever it comes."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

from faults.report import Outcome, collect
from test_resume_exact import compare
from toy_run import run as train_toy

from mmssl.train import checkpoint, preempt
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session

LIMIT_S = 30.0
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


def preemptions(folder: Path, wanted: int, rng: random.Random, stage: int) -> Iterator[bool]:
    """Stop runs of the toy at random moments until so many requests were answered.

    Whether each was answered in time with a checkpoint of the very step; a run that has come to its
    end must be equal to an undisturbed one, file by file.
    """
    train = {"steps": STEPS, "zero": stage, "save_every": 5, "log_every": 1}
    answered = 0
    # signals that come too late for a run end here and not in this process
    with preempt.StopRequest().listening(), session() as device:
        train_toy(device, str(folder / "whole"), train=train, **SETTINGS)
        while answered < wanted:
            part, stopped = folder / f"part{answered}", True
            while stopped:
                asker = Asker(rng, 0.6)
                progress = train_toy(device, str(part), train=train, **SETTINGS)
                seconds = time.monotonic() - asker.asked_at
                asker.timer.join()
                assert progress is not None
                stopped = progress.stopped == preempt.REASON
                if stopped:
                    newest, answered = checkpoint.newest(part), answered + 1
                    kept = read_manifest(newest)["step"] if newest else 0
                    yield seconds < LIMIT_S and progress.step == kept
            compare(folder / "whole", part, last=STEPS)


def run(count: int, seed: int) -> list[Outcome]:
    """`count` requests, shared by the ZeRO stages."""
    rng = random.Random(seed)

    def cases() -> Iterator[tuple[str, bool]]:
        for stage in range(4):
            with tempfile.TemporaryDirectory() as folder:
                for held in preemptions(Path(folder), -(-count // 4), rng, stage):
                    yield f"SIGTERM or SIGUSR1 at any time, ZeRO {stage}", held

    return collect("R9", cases())
