"""Mutual information by critics, and triplets mined in the batch."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmssl.heads.score import FusionMLP
from mmssl.objectives.critic import critic_loss, semi_hard


@pytest.mark.parametrize(
    ("bound", "want"), [("bce", 2 * math.log(2)), ("mine", 0.0), ("nce", math.log(129))]
)
def test_a_critic_of_zeros_knows_nothing(bound, want):
    zeros = torch.zeros(128)
    loss = critic_loss(zeros, zeros, zeros, zeros == 0, bound)
    torch.testing.assert_close(loss, torch.full((128,), want), atol=1e-6, rtol=0)


def test_the_losses_are_the_papers():
    g = torch.Generator().manual_seed(0)
    p, n = torch.randn(2, 8, generator=g, dtype=torch.float64).numpy()
    rows = torch.tensor([True] * 7 + [False])

    def got(bound):
        own, false = torch.from_numpy(p[:7]), torch.from_numpy(n[:7])
        return float(critic_loss(own, false, torch.from_numpy(n), rows, bound).mean())

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    p7, n7 = p[:7], n[:7]
    bce = -(np.log(sigmoid(p7)).mean() + np.log(1 - sigmoid(n7)).mean())
    mine = -(p7.mean() - np.log(np.exp(n7).mean()))
    nce = -(p7 - np.log(np.exp(p7) + np.exp(n7).sum())).mean()
    assert [got(b) for b in ("bce", "mine", "nce")] == pytest.approx([bce, mine, nce], abs=1e-12)


def test_mine_stays_finite_for_large_scores():
    own, false = torch.tensor([2000.0, 1000.0]), torch.tensor([3000.0, 1000.0])
    loss = critic_loss(own, false, false, torch.ones(2).bool(), "mine")
    want = torch.tensor([1000.0, 2000.0]) - math.log(2)
    torch.testing.assert_close(loss, want)


def test_mine_measures_correlated_gaussians():
    """rho = 0.9: 0.830 nats."""
    torch.manual_seed(0)
    critic = FusionMLP(1, 1, 64)
    optimiser = torch.optim.Adam(critic.parameters(), 5e-3)

    def bound(rows):
        x = torch.randn(rows, 1)
        y = 0.9 * x + math.sqrt(1 - 0.81) * torch.randn(rows, 1)
        own, false = critic.pairs(x, y), critic.pairs(x, y.roll(1, 0))
        return critic_loss(own, false, false, torch.ones(rows).bool(), "mine").mean()

    found = []
    for step in range(600):
        loss = bound(512)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            with torch.no_grad():
                found.append(-float(bound(50_000)))
    assert 0.75 < found[-1] < 0.85, found
    assert max(found) < 0.90


def cosines(distances):
    return 1 - torch.tensor(distances, dtype=torch.float64) / 2


def mined(rows, margin=0.1):
    """Losses of rows of squared distances whose first is the positive."""
    x = cosines(rows).requires_grad_()
    positive = torch.zeros(x.shape, dtype=torch.bool)
    positive[:, 0] = True
    loss, found = semi_hard(x, positive, torch.ones_like(positive), margin)
    return x, loss, found


def test_the_nearest_farther_negative_is_mined():
    x, loss, found = mined([[0.5, 0.3, 0.6, 0.9]], margin=0.3)
    assert found.tolist() == [True]
    assert loss.tolist() == pytest.approx([0.2])
    loss.sum().backward()
    assert x.grad.tolist() == [[-2.0, 0.0, 2.0, 0.0]]


def test_without_a_farther_one_the_farthest_serves():
    x, loss, found = mined([[0.5, 0.3, 0.4, 0.2]])
    assert found.tolist() == [False]
    assert loss.tolist() == pytest.approx([0.2])
    loss.sum().backward()
    assert x.grad.tolist() == [[-2.0, 0.0, 2.0, 0.0]]


def test_equal_vectors_cost_the_margin():
    _, loss, found = mined([[0.0] * 4] * 3)
    assert loss.tolist() == pytest.approx([0.1] * 3)
    assert not found.any()


def test_the_loss_is_torchs_with_squared_distances():
    g = torch.Generator().manual_seed(0)
    a, p = (F.normalize(torch.randn(16, 8, generator=g, dtype=torch.float64)) for _ in range(2))
    d = torch.cdist(a, p).square()
    chosen = []
    for i in range(16):
        others = [j for j in range(16) if j != i]
        farther = [j for j in others if d[i, j] > d[i, i]]
        chosen.append(
            min(farther, key=lambda j: d[i, j]) if farther else max(others, key=lambda j: d[i, j])
        )
    reference = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda x, y: (x - y).square().sum(1), margin=0.2, reduction="none"
    )
    own = torch.eye(16, dtype=torch.bool)
    got, _ = semi_hard(a @ p.T, own, torch.ones_like(own), 0.2)
    torch.testing.assert_close(got, reference(a, p, p[chosen]), atol=1e-12, rtol=0)


def test_a_query_without_a_negative_costs_nothing():
    x = torch.zeros(2, 2, requires_grad=True)
    own = torch.eye(2, dtype=torch.bool)
    valid = torch.tensor([[True, False], [True, True]])
    loss, _ = semi_hard(x, own, valid, 0.1)
    assert loss[0] == 0
    loss.sum().backward()
    assert x.grad[0].tolist() == [0, 0]
