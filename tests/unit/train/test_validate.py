from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import ToyModel, run

from mmssl.specs import ValidateSpec
from mmssl.train.checkpoint import Progress, find
from mmssl.train.commit import read_manifest
from mmssl.train.engine import session
from mmssl.train.validate import Validator, judge
from mmssl.types import UserError


def walk(spec: ValidateSpec, values: list[float]) -> tuple[list[bool], Progress]:
    progress, name = Progress(), spec.metric.removeprefix("-")
    better = []
    for value in values:
        progress.step += 10
        better.append(judge(spec, {name: value, "other": 0.0}, progress))
    return better, progress


def test_the_best_is_kept_and_patience_counts_evaluations_without_improvement() -> None:
    spec = ValidateSpec(every=1, metric="r", patience=2)
    better, progress = walk(spec, [0.1, 0.3, 0.3, math.nan])
    assert better == [True, True, False, False]
    assert (progress.best, progress.best_step, progress.waited) == (0.3, 20, 2)
    assert progress.stopped == "no better r in 2 evaluations"


def test_a_minus_minimises() -> None:
    better, progress = walk(ValidateSpec(every=1, metric="-rank"), [9.0, 12.0, 4.0])
    assert better == [True, False, True]
    assert progress.best == 4.0
    assert progress.stopped == ""


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"validation\.metric=r10: .* evaluates: a, b$"):
        judge(ValidateSpec(every=1, metric="r10"), {"b": 1.0, "a": 2.0}, Progress())


def test_evaluation_is_due_at_its_period_and_at_the_end() -> None:
    validator = Validator(ValidateSpec(every=4), ToyModel, lambda model, clips: {})
    assert [s for s in range(11) if validator.due(Progress(step=s), 10)] == [4, 8, 10]
    assert not validator.due(Progress(step=8, evaluated=8), 10)


def test_training_stops_early_keeps_the_best_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weights' size grows at every step, so the first evaluation of a minimum stays the best.
    changes = {"every": 1, "metric": "-weight", "patience": 2, "clips": 5}
    optim = {"weight_decay": 0.0, "lr": 0.1, "warmup": 0, "ema": 0.0}
    with session() as device:
        run(device, str(tmp_path), validate=changes, optim=optim, train={"steps": 40})
    last = find(tmp_path, "last")
    progress = read_manifest(last)["progress"]
    assert progress["stopped"] == "no better -weight in 2 evaluations"
    assert progress["step"] == progress["best_step"] + 2 < 40
    assert find(tmp_path).name == f"step-{progress['best_step']:08d}"
    assert f"stopped at step {progress['step']}" in capsys.readouterr().out
    assert '"clips": 5.0' in (tmp_path / "log.jsonl").read_text()


def test_evaluating_changes_nothing_in_the_training(tmp_path: Path) -> None:
    from mmssl.train.checkpoint import load_weights

    with session() as device:
        for name, every in (("with", 1), ("without", 0)):
            run(device, str(tmp_path / name), validate={"every": every})
    a, b = (load_weights(tmp_path / name, ema) for name in ("with", "without") for ema in [True])
    assert all(bool((a[key] == b[key]).all()) for key in a)
