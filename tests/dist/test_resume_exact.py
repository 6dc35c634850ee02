"""Train 6 steps = train 3, die, resume in a new process, train 3: equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TEST_LIMIT_S, checked
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]

SCRIPT = Path(__file__).with_name("toy_run.py")
KINDS = (".pt", ".safetensors")
STAGES = {stage: {"zero": stage} for stage in range(4)}


def launch(calls: list[dict[str, Any]], processes: int = 1) -> str:
    """Run `toy_run.py` and return what it printed."""
    return checked([SCRIPT, json.dumps(calls)], processes)


def same(a: Any, b: Any, where: str) -> None:
    """Recursive equality, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif hasattr(a, "__dict__"):
        same(vars(a), vars(b), where)
    else:
        assert a == b, where


def compare(whole: Path, resumed: Path, last: int = 6, averaged: bool = True) -> None:
    """Every file of the last checkpoints, and the logged losses."""
    same_checkpoint(whole, resumed, last, averaged)
    assert losses(whole) == losses(resumed)


def same_checkpoint(whole: Path, resumed: Path, last: int, averaged: bool = True) -> None:
    """Every file of the checkpoints of step `last`."""
    a, b = (folder / "checkpoints" / f"step-{last:08d}" for folder in (whole, resumed))
    names, others = (
        sorted(p.relative_to(f).as_posix() for p in f.rglob("*.*") if p.suffix in KINDS)
        for f in (a, b)
    )
    assert names == others
    assert ("ema.safetensors" in names) == averaged
    assert any(name.startswith("deepspeed/") for name in names)
    for name in names:
        if name.endswith(".pt"):
            x, y = (torch.load(f / name, weights_only=False) for f in (a, b))
            if "optimizer_state_dict" not in x:  # differ in the run's settings only
                x.pop("ds_config", None), y.pop("ds_config", None)
        else:
            x, y = load_file(a / name), load_file(b / name)
        same(x, y, name)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_bit_equal_at_every_zero_stage(tmp_path: Path, processes: int) -> None:
    extras = {"validate": {"every": 2, "metric": "weight"}}
    first, second = [], []
    for stage, train in STAGES.items():
        part = {
            **extras,
            "folder": str(tmp_path / f"part{stage}"),
            "train": {**train, "save_every": 3},
        }
        first.append({**extras, "folder": str(tmp_path / f"whole{stage}"), "train": train})
        first.append({**part, "fail_at": 3})
        second.append(part)
    launch(first, processes)
    for stage in STAGES:
        steps = sorted(p.name for p in (tmp_path / f"part{stage}" / "checkpoints").glob("step-*"))
        assert steps == ["step-00000003"]
    printed = launch(second, processes)
    assert printed.count("from step 3") == len(STAGES)
    for stage in STAGES:
        compare(tmp_path / f"whole{stage}", tmp_path / f"part{stage}")


def test_the_whole_model_resumes_bit_equal(tmp_path: Path) -> None:
    common = {"whole_model": True, "validate": {}}
    first, second = [], []
    for stage in (0, 3):
        train = {"zero": stage, "checkpoint_activations": stage == 3}
        part = {**common, "folder": str(tmp_path / f"part{stage}")}
        part["train"] = {**train, "save_every": 3}
        first.append({**common, "folder": str(tmp_path / f"whole{stage}"), "train": train})
        first.append({**part, "fail_at": 3})
        second.append(part)
    launch(first)
    launch(second[::-1])  # the runs of a process do not influence each other
    for stage in (0, 3):
        compare(tmp_path / f"whole{stage}", tmp_path / f"part{stage}")
    # Neither partitions nor recomputed activations change what is learned.
    plain, other = (losses(tmp_path / f"whole{stage}") for stage in (0, 3))
    assert other == pytest.approx(plain, rel=1e-4)


def test_resume_is_bit_equal_with_accumulation_and_bf16(tmp_path: Path) -> None:
    train = {"zero": 1, "accumulate": 2, "precision": "bf16"}
    part = {"folder": str(tmp_path / "part"), "train": {**train, "save_every": 3}}
    launch([{"folder": str(tmp_path / "whole"), "train": train}, {**part, "fail_at": 7}])
    launch([part])
    compare(tmp_path / "whole", tmp_path / "part")
