"""A run goes on with another number of processes: same loss, nothing read twice or left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TEST_LIMIT_S, checked
from test_resume_exact import SCRIPT, losses

from mmssl.train.checkpoint import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_another_number_of_processes_learns_the_same(
    tmp_path: Path, sizes: tuple[int, int]
) -> None:
    # the toy's loader gives the same global batches to any number of processes
    first, second = [], []
    for stage in range(4):
        train = {"zero": stage, "steps": 6, "save_every": 3}
        common = {"folder": str(tmp_path / str(stage)), "dropout": 0.0, "train": train}
        common["data"] = {"rows": 2, "workers": 2}
        whole = {**common, "folder": str(tmp_path / f"whole{stage}")}
        first += [whole, {**common, "fail_at": 3}]
        second.append(common)
    checked([SCRIPT, json.dumps(first)], sizes[0])
    checked([SCRIPT, json.dumps(second)], sizes[1])
    for stage in range(4):
        plain, other = losses(tmp_path / f"whole{stage}"), losses(tmp_path / str(stage))
        assert other == pytest.approx(plain, rel=1e-5)
        assert plain.keys() == set(range(1, 7))
        a, b = (load_weights(tmp_path / n, ema=True) for n in (f"whole{stage}", str(stage)))
        for name, value in a.items():
            # rounding moves a weight without gradient by Adam's whole step, here up to 0.01
            assert float((b[name] - value).abs().max()) <= 1e-4, name
