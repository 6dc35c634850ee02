"""Sinkhorn-Knopp against lightly's and the published matrix form, and the laws of assignments."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmssl.objectives.assignment import sinkhorn, soft_cross_entropy


def scores_of(rows, prototypes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(rows, 16, generator=generator, dtype=dtype), dim=-1)
    p = F.normalize(torch.randn(prototypes, 16, generator=generator, dtype=dtype), dim=-1)
    return z @ p.T


def published(scores, epsilon=0.05, iterations=3):
    """The algorithm as facebookresearch/swav states it: (K, B), mass 1 / K, then 1 / B."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_assignments_are_those_of_the_matrix_form(iterations):
    scores = scores_of(40, 12)
    found = sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(found, published(scores, 0.05, iterations), rtol=1e-12, atol=1e-14)


def test_assignments_and_loss_are_lightlys():
    loss = pytest.importorskip(
        "lightly.loss.swav_loss", reason="pip install --no-deps -r tests/peers.txt"
    )
    scores = scores_of(40, 12)
    torch.testing.assert_close(
        sinkhorn(scores), loss.sinkhorn(scores, 3, 0.05, False), rtol=1e-12, atol=1e-14
    )
    others = [scores_of(40, 12, seed) for seed in range(1, 4)]
    large, small = [scores, others[0]], others[1:]
    ours = sum(
        soft_cross_entropy(other, sinkhorn(one), 0.1).mean() / 6
        for one in large
        for other in [*large, *small]
        if other is not one
    )
    theirs = loss.SwaVLoss(0.1, 3, 0.05)(large, small).reshape(())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_rows_sum_to_one_and_prototypes_share_them_evenly_in_the_end():
    scores = scores_of(60, 12)
    torch.testing.assert_close(sinkhorn(scores).sum(1), torch.ones(60).double())
    evenly = torch.full((12,), 5.0).double()
    assert float((sinkhorn(scores, 0.05, 3).sum(0) - evenly).abs().max()) > 1e-3
    torch.testing.assert_close(sinkhorn(scores, 0.05, 400).sum(0), evenly, rtol=1e-9, atol=0)


def test_absent_rows_change_nothing_whatever_they_hold():
    scores = scores_of(20, 6)
    wild = torch.cat([scores[:7], torch.full((3, 6), 1e30).double(), scores[7:]])
    valid = torch.ones(23, dtype=torch.bool)
    valid[7:10] = False
    found = sinkhorn(wild, valid_B=valid)
    torch.testing.assert_close(found[valid], sinkhorn(scores), rtol=1e-13, atol=1e-15)
    assert not found[~valid].any()
    assert not sinkhorn(scores, valid_B=torch.zeros(20, dtype=torch.bool)).any()


def test_scores_that_overflow_half_precision_are_assigned():
    scores = torch.full((4, 3), -1.0, dtype=torch.float16)
    scores[range(4), [0, 1, 2, 0]] = 1.0  # exp(20) is infinite in fp16
    found = sinkhorn(scores)
    assert found.dtype == torch.float32
    assert found.argmax(1).tolist() == [0, 1, 2, 0]


def test_equal_scores_cost_ln_k_and_no_gradient_goes_through_the_assignment():
    same = torch.full((5, 3000), 0.3, requires_grad=True)
    code = sinkhorn(same)
    assert not code.requires_grad
    loss = soft_cross_entropy(same, code, 0.1)
    torch.testing.assert_close(loss, torch.full((5,), math.log(3000)), rtol=1e-5, atol=0)
