"""R7: a loss or gradient that is not finite changes nothing, and too many of them end the run."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TEST_LIMIT_S, checked

sys.path.append(str(Path(__file__).parents[1] / "dist"))

from toy_run import run

from mmssl.train.checkpoint import find, load_weights
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session
from mmssl.types import UserError

SCRIPT = Path(__file__).parents[1] / "dist" / "toy_run.py"
STEP = 3  # 0-based; the fourth


def poison(what: str, value: str, **more: Any) -> dict[str, Any]:
    return {"steps": [STEP], "what": what, "value": value, **more}


def events(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "event" in line]


def unchanged(folder: Path) -> None:
    """Weights, buffers and averages are those of before the poisoned step; training went on."""
    steps = [folder / "checkpoints" / f"step-{n:08d}" for n in (STEP, STEP + 1, STEP + 2)]
    for ema in (False, True):
        before, behind, later = (load_weights(step, ema) for step in steps)
        assert all(torch.equal(before[key], behind[key]) for key in before)
        assert any(not torch.equal(before[key], later[key]) for key in before)
        assert all(bool(value.isfinite().all()) for value in later.values())
    assert [e["step"] for e in events(folder) if e["event"] == "skipped"] == [STEP + 1]
    assert read_manifest(find(folder, "last"))["progress"]["skipped"] == 1


CASES = list(itertools.product(("input", "loss", "gradient"), ("nan", "inf")))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_leaves_the_step_out(tmp_path: Path, stage: int) -> None:
    with session() as device:
        for i, (what, value) in enumerate(CASES):
            train = {"zero": stage, "save_every": 1, "accumulate": 1 + i % 2}
            run(device, str(tmp_path / str(i)), poison=poison(what, value), train=train)
    for i in range(len(CASES)):
        unchanged(tmp_path / str(i))


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_all_ranks_leave_it_out_for_one_of_them(tmp_path: Path) -> None:
    cases = [(s, *case) for s, case in zip(itertools.cycle(range(4)), CASES * 3, strict=False)]
    calls = [
        {
            "folder": str(tmp_path / str(i)),
            "poison": poison(what, value, rank=i % 2),
            "train": {"zero": stage, "save_every": 1},
        }
        for i, (stage, what, value) in enumerate(cases[:16])
    ]
    checked([SCRIPT, json.dumps(calls)], processes=2)
    for i in range(16):
        unchanged(tmp_path / str(i))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_after_too_many_the_run_goes_back_and_other_data_follow(tmp_path: Path, stage: int) -> None:
    train = {"zero": stage, "save_every": 2, "bad_steps": 2, "steps": 8}
    spoilt = {"steps": [4, 5], "what": "gradient", "value": "nan", "stubborn": False}
    with session() as device:
        run(device, str(tmp_path / "a"), poison=spoilt, train=train)
        run(device, str(tmp_path / "b"), train=train)
    assert [(e["event"], e["step"]) for e in events(tmp_path / "a")] == [
        ("skipped", 5),
        ("skipped", 6),
        ("rolled back", 4),
    ]
    progress = read_manifest(find(tmp_path / "a", "last"))["progress"]
    assert (progress["step"], progress["skipped"], progress["rollbacks"]) == (8, 2, 1)
    lines = map(json.loads, (tmp_path / "a" / "log.jsonl").read_text().splitlines())
    second = {line["step"]: line["loss"] for line in lines if "loss" in line}
    lines = map(json.loads, (tmp_path / "b" / "log.jsonl").read_text().splitlines())
    plain = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [second[n] == plain[n] for n in (1, 4, 5, 6)] == [True, True, False, False]


@pytest.mark.parametrize("train", [{"save_every": 2}, {}])
def test_the_second_time_or_without_a_checkpoint_it_stops(
    tmp_path: Path, train: dict[str, Any]
) -> None:
    stubborn = {"steps": [3, 4, 5], "what": "loss", "value": "nan"}
    step, tried = (6, "after going back once") if train else (5, "there is no checkpoint")
    with session() as device:
        with pytest.raises(UserError, match=rf"step {step}: the loss `contrast` .* {tried}"):
            run(device, str(tmp_path), poison=stubborn, train={**train, "bad_steps": 2})
        if train:  # it goes on from there, in the same folder and process
            run(device, str(tmp_path), train={**train, "bad_steps": 2})
            assert find(tmp_path, "last").name == "step-00000006"
