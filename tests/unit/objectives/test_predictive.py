"""Predictive information: analytic processes, invariance, the bias of few windows, validity."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import toeplitz
from scipy.signal import lfilter
from scipy.special import digamma

from mmssl.objectives.predictive import predictive_information, whiteness


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def information(z_PNF, half, valid_PN=None, ridge=1e-6):
    if valid_PN is None:
        valid_PN = torch.ones(z_PNF.shape[:2], dtype=torch.bool)
    total, count = predictive_information(z_PNF, valid_PN, half, ridge)
    return (total / count).item()


def autoregression(frames, a=0.9, seed=0):
    """(1, N, 1) stationary AR(1) of unit variance."""
    noise = np.random.default_rng(seed).standard_normal(frames) * math.sqrt(1 - a * a)
    noise[0] /= math.sqrt(1 - a * a)
    return torch.from_numpy(lfilter([1.0], [1.0, -a], noise)).reshape(1, -1, 1)


@pytest.mark.parametrize("half", [1, 2, 4, 8])
def test_a_markov_process_tells_one_frame_whatever_the_window(half):
    """AR(1) with a = 0.9: -ln(1 - a^2) / 2 = 0.830 nats; 200,000 frames give it to 0.01."""
    found = information(autoregression(200_000), half)
    assert found == pytest.approx(-0.5 * math.log(1 - 0.81), abs=0.01)


@pytest.mark.parametrize("half", [1, 3])
def test_an_average_of_two_tells_what_its_covariance_says(half):
    """x = e + e' of the frame before: not Markov, PI from the exact Toeplitz covariances."""
    e = normal(1, 200_001, 1)
    lags = np.zeros(2 * half)
    lags[:2] = 2.0, 1.0
    _, whole = np.linalg.slogdet(toeplitz(lags))
    _, first = np.linalg.slogdet(toeplitz(lags[:half]))
    found = information(e[:, 1:] + e[:, :-1], half)
    assert found == pytest.approx(first - 0.5 * whole, abs=0.01)


def test_an_invertible_mixture_of_the_features_changes_nothing():
    parts = [autoregression(4000, a, i) for i, a in enumerate((0.9, 0.5, 0.0))]
    z = torch.cat(parts, -1)
    mixed = z @ normal(3, 3, seed=9) + normal(3, seed=8)
    assert information(mixed, 4, ridge=1e-12) == pytest.approx(
        information(z, 4, ridge=1e-12), abs=1e-6
    )


def test_white_noise_tells_the_bias_of_few_windows_and_no_more():
    """(T F)^2 / (2 W) = 0.144 nats of 500 windows to first order; 0.148 by the expected log
    determinants of Wishart matrices, sums of digammas; next to nothing of many windows.
    """
    digammas = digamma((499 - np.arange(24)) / 2)
    exact = digammas[:12].sum() - 0.5 * digammas.sum()
    assert exact == pytest.approx(0.148, abs=1e-3)
    few = [information(normal(1, 507, 3, seed=s), 4) for s in range(40)]
    assert np.mean(few) == pytest.approx(exact, abs=0.01)
    assert information(normal(1, 200_007, 3), 4) == pytest.approx(144 / 400_000, abs=3e-4)


def test_windows_do_not_reach_over_rows_and_padding():
    """Windows lie inside the valid frames of a row; what else it holds changes nothing."""
    z = autoregression(3000)
    pieces = z.reshape(30, 100, 1).clone()
    valid = torch.ones(30, 100, dtype=torch.bool)
    valid[:, 90:] = False
    pieces[:, 90:] = float("nan")
    total, count = predictive_information(pieces, valid, 4)
    assert count == 30 * (90 - 7)
    windows = torch.cat([p[:90].unfold(0, 8, 1)[:, 0] for p in pieces])
    covariance = np.cov(windows.T.numpy(), ddof=0) + 1e-6 * np.eye(8)
    expected = np.linalg.slogdet(covariance[:4, :4])[1] - 0.5 * np.linalg.slogdet(covariance)[1]
    assert (total / count).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", [lambda z, v: predictive_information(z, v, 3), whiteness])
def test_no_windows_cost_nothing_and_gradients_are_finite(loss):
    z = normal(2, 5, 2).requires_grad_()
    total, count = loss(z, torch.zeros(2, 5, dtype=torch.bool))
    total.backward()
    assert (total.item(), count.item(), z.grad.abs().sum().item()) == (0, 0, 0)
    short = normal(2, 2, 2).float().requires_grad_()
    total, _ = loss(short, torch.ones(2, 2, dtype=torch.bool))
    total.backward()
    assert short.grad.isfinite().all()
    equal = torch.ones(4, 9, 2, requires_grad=True)  # all frames alike: the ridge keeps it finite
    total, _ = loss(equal, torch.ones(4, 9, dtype=torch.bool))
    total.backward()
    assert total.isfinite()
    assert equal.grad.isfinite().all()


def test_whiteness_is_the_distance_of_the_covariance_from_the_identity():
    z = normal(4, 50, 3)
    valid = torch.ones(4, 50, dtype=torch.bool)
    valid[3] = False
    total, count = whiteness(z * torch.tensor([1.0, 2.0, 3.0]) + 5.0, valid)
    kept = z[:3].reshape(-1, 3).numpy() * [1.0, 2.0, 3.0]
    expected = np.square(np.cov(kept.T, ddof=0) - np.eye(3)).sum()
    assert count == 150
    assert (total / count).item() == pytest.approx(expected, rel=1e-9)
