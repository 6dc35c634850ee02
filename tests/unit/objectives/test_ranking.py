"""Perturbed ranks: analytic values, the gradient by enumeration, and what the loss tends to."""

import itertools
import math

import pytest
import torch

from mmssl.objectives import ranking
from mmssl.objectives.ranking import kendall_tau, normal_noise, perturbed_ranking, ranks


def noise_of(things, draws, rows=1, stream="noise"):
    seeds = torch.arange(rows) + 7
    return normal_noise(seeds, draws, things, stream).double()


def test_ranks_are_numpys_and_ties_keep_their_order():
    assert ranks(torch.tensor([0.3, -1.0, 2.0])).tolist() == [2, 1, 3]
    assert ranks(torch.tensor([1.0, 1.0, 0.0])).tolist() == [2, 3, 1]


def test_noise_is_standard_normal_and_a_rows_own():
    z = noise_of(10, 4000, 3)
    assert abs(float(z.mean())) < 0.01
    assert abs(float(z.std()) - 1) < 0.01
    assert z.isfinite().all()
    assert torch.equal(normal_noise(torch.tensor([8]), 4000, 10, "noise").double(), z[1:2])


def test_noise_is_finite_at_both_ends_of_what_is_drawn(monkeypatch):
    ends = torch.tensor([[0.0, 1 - 2.0**-24]])
    monkeypatch.setattr(ranking, "row_uniform", lambda *_: ends)
    low, high = normal_noise(torch.tensor([1]), 1, 2, "noise")[0, 0].tolist()
    assert high == pytest.approx(5.42, abs=0.01)
    assert low == -high


@pytest.mark.parametrize(("things", "value"), [(6, 8.463), (9, 20.311), (10, 25.389)])
@pytest.mark.parametrize("epsilon", [1.0, 0.5])
def test_equal_scores_cost_the_noise_alone(things, value, epsilon):
    """e n (n - 1) / (2 sqrt(pi)), and the gradient (n + 1) / 2 - y."""
    exact = epsilon * things * (things - 1) / (2 * math.sqrt(math.pi))
    assert exact == pytest.approx(epsilon * value, abs=1e-3)
    theta = torch.zeros(1, things, dtype=torch.float64, requires_grad=True)
    target = torch.randperm(things, generator=torch.Generator().manual_seed(0))[None] + 1
    loss = perturbed_ranking(theta, target, noise_of(things, 40_000), epsilon)
    assert float(loss.detach()) == pytest.approx(exact, rel=0.01)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    want = (things + 1) / 2 - target
    assert float((gradient - want).abs().max()) < 0.06


def test_value_and_gradient_are_those_of_an_argmax_over_all_permutations():
    """Brute force with the same noise: what jaxopt's make_fenchel_young_loss computes."""
    torch.manual_seed(0)
    theta = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[2, 1, 4, 3], [4, 3, 2, 1]])
    noise = noise_of(4, 50, 2)
    loss = perturbed_ranking(theta, target, noise, 0.7)
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    orders = torch.tensor(list(itertools.permutations(range(1, 5)))).double()
    values = (theta.detach()[:, None] + 0.7 * noise) @ orders.T
    best = values.max(-1)
    want = best.values.mean(1) - (theta.detach() * target).sum(1)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, orders[best.indices].mean(1) - target, rtol=0, atol=1e-12)


def test_confident_right_scores_cost_nothing_and_wrong_ones_much():
    target = torch.tensor([[3, 1, 2, 5, 4]])
    noise = noise_of(5, 2000)
    right = [float(perturbed_ranking(c * target.double(), target, noise)) for c in (0, 1, 4, 20)]
    assert right == sorted(right, reverse=True)
    assert -0.5 < right[-1] < 0.5  # the noise's own mean is left
    assert float(perturbed_ranking(-20.0 * target, target, noise)) > 300


def test_kendalls_tau_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    theta, other = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    want = [stats.kendalltau(a, b).statistic for a, b in zip(theta, other, strict=True)]
    torch.testing.assert_close(kendall_tau(theta, other).double(), torch.tensor(want).double())
