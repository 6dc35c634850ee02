"""R7: a loss or gradient that is not finite changes neither weights nor averages, on any rank."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

import torch
from faults.report import Outcome, collect
from launching import checked

from mmssl.train.checkpoint import find, load_weights
from mmssl.train.commit import read_manifest

HERE = Path(__file__).parent

SCRIPT = HERE.parent / "dist" / "toy_run.py"
STEP = 3  # 0-based; the fourth
RANKS = 2
KINDS = list(itertools.product(("input", "loss", "gradient"), ("nan", "inf")))


def events(folder: Path) -> list[dict[str, Any]]:
    """What has happened, from the log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "event" in line]


def unchanged(folder: Path) -> bool:
    """Weights, buffers and averages are those of before the poisoned step; training went on."""
    steps = [folder / "checkpoints" / f"step-{n:08d}" for n in (STEP, STEP + 1, STEP + 2)]
    good = [e["step"] for e in events(folder) if e["event"] == "skipped"] == [STEP + 1]
    good &= read_manifest(find(folder, "last"))["progress"]["skipped"] == 1
    for ema in (False, True):
        before, behind, later = (load_weights(step, ema) for step in steps)
        good &= all(torch.equal(before[key], behind[key]) for key in before)
        good &= any(not torch.equal(before[key], later[key]) for key in before)
        good &= all(bool(value.isfinite().all()) for value in later.values())
    return good


def run(count: int, seed: int) -> list[Outcome]:
    """`count` cases: input, loss or gradient, of one rank or all, at all ZeRO stages."""
    plans = []
    for i in range(count):
        what, value = KINDS[i % len(KINDS)]
        poison: dict[str, Any] = {"steps": [STEP], "what": what, "value": value}
        who = (seed + i // len(KINDS)) % (RANKS + 1)  # the last: all of them
        poison |= {"rank": who} if who < RANKS else {}
        train = {"zero": i % 4, "save_every": 1, "keep_last": 0, "accumulate": 1 + i % 2}
        whose = "one rank" if who < RANKS else "all ranks"
        plans.append((f"{value} in the {what} of {whose}", {"poison": poison, "train": train}))

    def cases() -> Iterator[tuple[str, bool, float]]:
        with tempfile.TemporaryDirectory() as name:
            calls = [{**plan, "folder": f"{name}/{i}"} for i, (_, plan) in enumerate(plans)]
            checked([SCRIPT, json.dumps(calls)], RANKS)
            for i, (what, _) in enumerate(plans):
                folder = Path(name, str(i))
                minutes = json.loads((folder / "summary.json").read_text())["minutes"]
                yield what, unchanged(folder), 60 * minutes

    return collect("R7", cases())
