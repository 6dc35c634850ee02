"""Regression errors as (sum, count)."""

import pytest
import torch
from torch.nn import functional as F

from mmssl.objectives import regression as reg


def _pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randn(3, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
    return prediction, target, torch.rand(3, 5, generator=g) < 0.5


def test_errors_equal_torch_on_the_marked_positions() -> None:
    prediction, target, mask = _pair()
    total, count = reg.mean_square(prediction, target, mask)
    assert count.item() == mask.sum().item()
    torch.testing.assert_close(total / count, F.mse_loss(prediction[mask], target[mask]))
    total, count = reg.smooth_l1(prediction, target, mask, beta=0.5)
    expected = F.smooth_l1_loss(prediction[mask], target[mask], beta=0.5)
    torch.testing.assert_close(total / count, expected)
    total, count = reg.mean_square(prediction, target)
    torch.testing.assert_close(total / 15, F.mse_loss(prediction, target))
    assert count.item() == 15


def test_unmarked_positions_and_targets_send_no_gradient() -> None:
    prediction, target, mask = _pair()
    with torch.no_grad():
        prediction[~mask] = float("nan")
        target[~mask] = float("inf")
    total, _ = reg.mean_square(prediction, target, mask)
    total.backward()
    assert torch.isfinite(total)
    assert prediction.grad is not None
    assert torch.equal(prediction.grad.abs().sum(-1) > 0, mask)
    assert target.grad is None
    total, count = reg.smooth_l1(prediction, target, torch.zeros_like(mask))
    assert (total.item(), count.item()) == (0, 0)


def test_predicting_the_mean_of_normalised_patches_costs_one() -> None:
    x = 7 + 3 * torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(1))
    normal = reg.patch_normalise(x)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(-1), torch.ones(2, 6), atol=1e-5, rtol=0)
    total, count = reg.mean_square(torch.zeros_like(normal), normal)
    assert (total / count).item() == pytest.approx(47 / 48, abs=1e-4)  # unbiased variance
    assert torch.equal(reg.patch_normalise(torch.ones(1, 1, 8)), torch.zeros(1, 1, 8))


def test_different_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and target \(2, 1\)"):
        reg.mean_square(torch.zeros(2, 3), torch.zeros(2, 1))
