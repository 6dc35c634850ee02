"""R7: too many steps that are not finite take a run back to its checkpoint, once, and then end it.

What a single one leaves untouched is in `not_finite`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "dist"))

from faults.not_finite import events
from test_resume_exact import losses
from toy_run import run

from mmssl.train.checkpoint import find
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session
from mmssl.types import UserError


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
    second, plain = (losses(tmp_path / name) for name in "ab")
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
