"""Batch norms of convolutional towers cover all ranks: several compute what one computes."""

from __future__ import annotations

from pathlib import Path

import conv_ranks
import pytest
import torch
from launching import TEST_LIMIT_S, checked

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_equal_one(tmp_path: Path, processes: int) -> None:
    checked([Path(conv_ranks.__file__), tmp_path / "out.pt"], processes)
    ours = torch.load(tmp_path / "out.pt", weights_only=True)
    reference = conv_ranks.run()
    assert set(ours) == set(reference)
    for network, expected in reference.items():
        assert set(ours[network]) == set(expected)
        largest = max(float(v.abs().max()) for n, v in expected.items() if n.endswith("weight"))
        assert largest > 0
        limit = 1e-6 if network == "sincnet" else 1e-8  # its filters are fp32
        for name, value in expected.items():
            error = float((ours[network][name] - value).abs().max())
            floor = 1e-6 * largest
            assert error <= limit * max(float(value.abs().max()), floor), (network, name)
