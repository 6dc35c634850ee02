"""Two and four processes compute what one computes: losses, gradients and batch statistics."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launching import LIMIT_S, TEST_LIMIT_S
from torch import Tensor, nn

import mmssl

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)

SCRIPT = Path(__file__).with_name("gather_ranks.py")
MIL = ["mil_released", "mil_strict", "mil_symmetric"]
CASES = ["info_nce", "sigmoid", "bilinear", *MIL, "dense", "dense_aligned", "match"]


def launch(world: int, out: Path, problems: str = "[]") -> dict[str, Any]:
    """Run the script on every rank and return what rank 0 saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(Path(mmssl.__file__).parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), problems],
            env={**env, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)
    results: dict[str, Any] = torch.load(out, weights_only=True)
    return results


@pytest.fixture(scope="module", params=[2, 4])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(world size, results of its rank 0)."""
    return request.param, launch(request.param, tmp_path_factory.mktemp("ranks") / "out.pt")


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    """The script as a module, for the run on one process."""
    spec = importlib.util.spec_from_file_location("gather_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gather_ranks"] = module
    spec.loader.exec_module(module)
    return module


def distance(a: Tensor, b: Tensor) -> float:
    """max|difference| / max|reference|.

    Where the reference vanishes (a bias in front of batch norm has gradient 0 up to rounding) the
    denominator is 1e-6.
    """
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_one_process(job: Any, toy: ModuleType, case: str) -> None:
    world, results = job
    ours, reference = results["cases"][case], toy.run(case)
    assert ours["loss"].item() == pytest.approx(reference["loss"].item(), rel=1e-12)
    assert ours["touched"] == reference["touched"] * world  # no rank leaves a parameter unused
    assert any(g.abs().max() > 1e-3 for g in reference["gradients"].values())
    for name, expected in reference["gradients"].items():
        assert distance(ours["gradients"][name], expected) <= 1e-6, name
    for name, expected in reference["buffers"].items():
        torch.testing.assert_close(ours["buffers"][name], expected, rtol=1e-12, atol=1e-12)


def test_a_gather_without_remote_gradient_fails_the_same_test(job: Any, toy: ModuleType) -> None:
    ours = job[1]["cases"]["plain_gather"]["gradients"]
    reference = toy.run("info_nce")["gradients"]
    errors = [distance(ours[name], g) for name, g in reference.items() if g.abs().max() > 1e-6]
    assert max(errors) > 0.05


def test_batch_norm_equals_torch_on_the_concatenated_valid_rows(job: Any, toy: ModuleType) -> None:
    ours, problem = job[1]["norm"], toy.problem()
    valid = problem["has_text"].any(1)
    assert not valid[: toy.G // 2].any()  # the first of two ranks has no valid row
    norm = nn.BatchNorm1d(toy.D).double()
    x = problem["video"].requires_grad_()
    y = norm(x[valid])
    (y.square() * y * torch.arange(1.0, toy.D + 1, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(ours["y"][valid], y.detach(), rtol=1e-9, atol=1e-9)
    assert ours["y"][~valid].abs().sum() == 0
    assert distance(ours["x_grad"], x.grad) <= 1e-6
    assert distance(ours["weight_grad"], norm.weight.grad) <= 1e-6
    torch.testing.assert_close(ours["buffers"]["running_mean"], norm.running_mean)
    torch.testing.assert_close(ours["buffers"]["running_var"], norm.running_var)
    assert ours["buffers"]["num_batches_tracked"].tolist() == [1]


def test_collectives_keep_rank_order_and_types(job: Any) -> None:
    world, results = job
    got = results["collectives"]
    ranks = range(world)
    assert got["gather"] == [r + 1.0 for r in ranks for _ in range(2)]
    weights = sum(r + 1 for r in ranks)
    assert got["x_grad"] == [float(weights * i) for i in range(2 * world)]
    assert got["y_grad"] == weights
    assert got["ids"] == [[10 * r, 10 * r + 1] for r in ranks]
    assert got["flags"] == [r == 0 for r in ranks]
    assert got["empty"] == [0, 3]
    assert got["halves"] == [float(r) for r in ranks]
    assert got["sum"] == [sum(ranks), world]
    assert got["object"] == {"from": 1}
    assert got["objects"] == ["x" * r for r in ranks]
