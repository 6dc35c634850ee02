"""What covers the codes and latents of all ranks is that of one, though a rank has no valid frame."""

from __future__ import annotations

from pathlib import Path

import code_ranks
import pytest
import torch
from launching import TEST_LIMIT_S, checked

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)


def test_two_ranks_average_probabilities_before_the_entropy(tmp_path: Path) -> None:
    checked([Path(code_ranks.__file__), tmp_path / "out.pt"], processes=2)
    ours = torch.load(tmp_path / "out.pt", weights_only=True)
    reference = code_ranks.run()
    assert 0 < reference["count"].item() < code_ranks.G * code_ranks.N
    assert torch.equal(ours["ids"], reference["ids"])
    for name in ("loss", "soft", "hard", "usage", "information", "count"):
        assert ours[name].item() == pytest.approx(reference[name].item(), rel=1e-12)
    assert set(ours["gradients"]) == set(reference["gradients"]) != set()
    for name, expected in reference["gradients"].items():
        difference = (ours["gradients"][name] - expected).abs().max()
        assert difference.item() <= 1e-6 * expected.abs().max().item()
