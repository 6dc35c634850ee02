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


def test_other_scales_of_data2vec() -> None:
    prediction, target, mask = _pair()
    p, t = prediction[mask], target[mask].detach()
    total, count = reg.mean_absolute(prediction, target, mask)
    torch.testing.assert_close(total / count, F.l1_loss(p, t))
    total, count = reg.scaled_square(prediction, target, mask)
    torch.testing.assert_close(total, ((p - t).square().sum(-1) / 4**0.5).sum())
    assert count.item() == mask.sum().item()
    total, count = reg.smooth_l1(prediction, target, mask, beta=4.0, summed=True)
    expected = F.smooth_l1_loss(p, t, beta=4.0, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count.item() == mask.sum().item()
    total.backward()
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad[mask], ((p - t) / 4).detach())  # all within beta


def test_a_zero_prediction_of_standardised_targets_costs_the_root_of_the_width() -> None:
    g = torch.Generator().manual_seed(2)
    layers = torch.randn(8, 2, 100, 768, generator=g)
    layers = (layers - layers.mean(2, keepdim=True)) / layers.std(2, correction=0, keepdim=True)
    for k, expected in ((1, 27.71), (8, 27.71 / 8)):  # sqrt(768), and of eight independent layers
        target = layers[:k].mean(0)
        total, count = reg.scaled_square(torch.zeros_like(target), target)
        assert (total / count).item() == pytest.approx(expected, rel=0.01)


def test_smooth_l1_on_both_sides_of_beta() -> None:
    prediction = torch.tensor([[[1.0, 5.0]]])
    total, _ = reg.smooth_l1(prediction, torch.zeros(1, 1, 2), beta=2.0)
    assert total.item() == pytest.approx((1 / 4 + 5 - 1) / 2)
    total, _ = reg.smooth_l1(prediction, torch.zeros(1, 1, 2), beta=2.0, summed=True)
    assert total.item() == pytest.approx(1 / 4 + 5 - 1)


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
    for loss in (reg.smooth_l1, reg.scaled_square, reg.mean_absolute):
        total, count = loss(prediction, target, torch.zeros_like(mask))
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
