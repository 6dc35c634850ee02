"""ZeRO 0-3 on one and two processes compute what plain PyTorch computes on one."""

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
from mmssl.train.optim import build_optimizer, set_learning_rate  # noqa: E402
from mmssl.train.schedule import learning_rate  # noqa: E402

BATCH = 6
# The bias of attention keys has no gradient but rounding; a small eps would blow that up to steps.
NOISE = {"tower.qkv.bias"}
PLAIN = {"eps": 1e-3, "weight_decay": 0.2}


def launch(calls: list[dict[str, Any]], processes: int) -> str:
    """Run `toy_run.py` and return what it printed."""
    return checked([HERE / "toy_run.py", json.dumps(calls)], processes)


def reference(model: ToyModel, accumulate: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of the first step without DeepSpeed."""
    loader, losses = ToyLoader(BATCH // accumulate), []
    for _ in range(accumulate):
        loss, _ = model(next(loader), 0, 6)
        (loss / accumulate).backward()
        losses.append(loss.detach())
    grads = {k: p.grad for k, p in model.named_parameters() if k != "still"}
    return {**grads, "loss": torch.stack(losses).mean().view(1)}


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("processes", [1, 2])
def test_loss_and_gradients_equal_plain_pytorch(tmp_path: Path, processes: int) -> None:
    cases = {f"zero{stage}": {"zero": stage} for stage in range(4)}
    cases["accumulated"] = {"zero": 2, "accumulate": 3 if processes == 1 else 1}
    cases |= {f"bf16 {n}": {"zero": n, "precision": "bf16"} for n in (0, 3)}
    launch(
        [
            {"file": str(tmp_path / name), "train": {"batch": BATCH, **train}}
            for name, train in cases.items()
        ],
        processes,
    )
    for name, train in cases.items():
        torch.manual_seed(0)
        expected = reference(ToyModel(dropout=0.0), train.get("accumulate", 1))
        got = load_file(tmp_path / name)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            error = (got[key] - value).norm() / value.norm()
            if name.startswith("bf16"):
                assert key in NOISE or 1e-5 < error <= 0.06, (name, key, float(error))
            else:
                error = (got[key] - value).abs().max() / value.abs().max()
                assert error <= 1e-5, (name, key, float(error))


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_weights_after_training_equal_a_plain_loop(tmp_path: Path) -> None:
    calls = [
        {
            "folder": str(tmp_path / f"{stage}"),
            "dropout": 0.0,
            "train": {"batch": BATCH, "zero": stage},
            "optim": PLAIN,
        }
        for stage in range(4)
    ]
    launch(calls, 1)
    model, average, norms = plain_training()
    for stage in range(4):
        folder = tmp_path / f"{stage}"
        weights = load_file(folder / "checkpoints/step-00000006/weights.safetensors")
        averaged = load_file(folder / "checkpoints/step-00000006/ema.safetensors")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(averaged[key], average.get(key, value), rtol=1e-4, atol=1e-6)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
        assert torch.equal(weights["still"], torch.ones(3, 3))


def plain_training() -> tuple[ToyModel, dict[str, Tensor], list[float]]:
    """The toy's six steps in plain PyTorch: weights, their average and the gradient norms."""
    spec = toy_spec(train={"batch": BATCH}, optim=PLAIN)
    torch.manual_seed(seed_of(spec.train.seed, "weights"))
    model = ToyModel(dropout=0.0)
    optimizer = build_optimizer(model, model.parameter_policy(), spec.optim)
    trained = [p for p in model.parameters() if p.requires_grad]
    average = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    loader, norms = ToyLoader(BATCH), []
    for step in range(6):
        loss, _ = model(next(loader), step, 6)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, spec.optim.clip)))
        rate = learning_rate(spec.optim, step, 6)
        set_learning_rate(optimizer.param_groups, rate, spec.optim.lr)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step, 6)
        decay = min(0.5 + 0.4 * step / 6, (1 + step) / (10 + step))
        for key, value in average.items():
            value.mul_(decay).add_(model.get_parameter(key).detach(), alpha=1 - decay)
    return model, average, norms


@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_two_processes_print_once_and_log_the_global_batch(tmp_path: Path) -> None:
    printed = [
        launch(
            [
                {
                    "folder": str(tmp_path / f"{name}{stage}"),
                    "dropout": 0.0,
                    "train": {"batch": 8, "zero": stage},
                }
                for stage in (0, 3)
            ],
            processes,
        )
        for name, processes in (("one", 1), ("two", 2))
    ]
    assert [text.count("step 6/6") for text in printed] == [2, 2]
    for stage in (0, 3):
        one, two = (lines(tmp_path / f"{n}{stage}") for n in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["count/contrast"] == a["count/contrast"] == 8
            assert b["term/contrast"] == pytest.approx(a["term/contrast"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
