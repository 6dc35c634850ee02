"""LARS takes the norms of whole tensors at every ZeRO stage, however its pieces lie."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TEST_LIMIT_S, checked
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from toy_run import ToyLoader, ToyModel, toy_spec  # noqa: E402

from mmssl.rng import seed_of  # noqa: E402
from mmssl.train.schedule import learning_rate  # noqa: E402

BATCH, STEPS = 8, 6
OPTIM = {"kind": "lars", "lr": 20.0, "betas": [0.8, 0.9], "weight_decay": 0.3, "clip": 0.0}
LAST = f"checkpoints/step-{STEPS:08d}/weights.safetensors"


def written_out() -> dict[str, Tensor]:
    """Six steps by the closed form, in one process without any optimiser."""
    spec = toy_spec(train={"batch": BATCH}, optim=OPTIM)
    torch.manual_seed(seed_of(spec.train.seed, "weights"))
    model, loader = ToyModel(dropout=0.0), ToyLoader(BATCH)
    rules = model.parameter_policy()
    trained = {k: p for k, p in model.named_parameters() if not rules[k].frozen}
    velocity = {k: torch.zeros_like(p) for k, p in trained.items()}
    for step in range(STEPS):
        loss, _ = model(next(loader), step, STEPS)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        lr = learning_rate(spec.optim, step, STEPS)
        with torch.no_grad():
            for (name, w), d in zip(trained.items(), gradients, strict=True):
                rate = torch.ones(())
                if w.dim() > 1:
                    d = d + (0.3 * w if rules[name].decay else 0)
                    rate = 1e-3 * w.norm() / d.norm()
                velocity[name] = 0.8 * velocity[name] + rate * d
                w -= lr * rules[name].lr_scale * velocity[name]
        model.after_step(step, STEPS)
    return model.state_dict()


def calls(folder: Path, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "folder": str(folder / str(stage)),
            "dropout": 0.0,
            "train": {"batch": BATCH, "zero": stage, "save_every": 2},
            "optim": OPTIM,
            **more,
        }
        for stage in range(4)
    ]


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_weights_equal_the_closed_form_at_every_stage_and_after_a_resume(tmp_path: Path) -> None:
    whole, parted = calls(tmp_path / "whole"), calls(tmp_path / "parted")
    died = [{**call, "fail_at": 4} for call in parted]
    checked([HERE / "toy_run.py", json.dumps([*whole, *died, *parted])], 2)
    expected = written_out()
    torch.manual_seed(seed_of(toy_spec().train.seed, "weights"))
    start = ToyModel(dropout=0.0).state_dict()
    for stage in range(4):
        got = load_file(tmp_path / f"whole/{stage}" / LAST)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=f"{stage} {key}")
        for key, value in load_file(tmp_path / f"parted/{stage}" / LAST).items():
            assert torch.equal(value, got[key]), (stage, key)
    moved = {k: float((v - start[k]).norm() / v.norm()) for k, v in expected.items() if v.dim() > 1}
    assert min(v for k, v in moved.items() if k not in ("still", "queue")) > 0.01, moved


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_going_on_with_fewer_processes_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    call = calls(tmp_path)[2]
    checked([HERE / "toy_run.py", json.dumps([{**call, "fail_at": 4}])], 2)
    with pytest.raises(AssertionError, match="written by 2 processes, here are 1; with"):
        checked([HERE / "toy_run.py", json.dumps([call])], 1)
