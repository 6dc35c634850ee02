"""Players on two ranks learn what they learn on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import TEST_LIMIT_S, checked
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]
SCRIPT = Path(__file__).with_name("turn_ranks.py")
LAST = "checkpoints/step-00000006/weights.safetensors"


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    one, *two = (tmp_path / name for name in ("one", "two", "two-zero1"))
    checked([SCRIPT, json.dumps([{"folder": str(one), "zero": 0}])])
    calls = [{"folder": str(f), "zero": zero} for zero, f in enumerate(two)]
    checked([SCRIPT, json.dumps(calls)], 2)
    want = load_file(one / LAST)
    assert not torch.equal(want["tasks.alignment.mapping.weight"], torch.eye(8))
    for folder in two:
        for name, value in load_file(folder / LAST).items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
