"""Siamese objectives: analytic values, references, stop-gradients."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmssl.objectives.siamese import cross_correlation, negative_cosine, queue_nce, redundancy

LAMBDA = 0.0051


def rows(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everyone(x):
    return torch.ones(len(x), dtype=torch.bool)


def barlow(a, b, valid=None):
    return redundancy(cross_correlation(a, b, everyone(a) if valid is None else valid), LAMBDA)


def unit(n, d, seed):
    return F.normalize(rows(n, d, seed), dim=-1)


# ---------------------------------------------------------------- regression


def test_cosine_of_equal_orthogonal_and_opposite_vectors():
    p = torch.tensor([[3.0, 0], [0, 2], [-5, 0]])
    t = torch.tensor([[1.0, 0]]).expand(3, 2)
    assert negative_cosine(p, t).tolist() == [-1, 0, 1]
    # the squared distance of the unit vectors (BYOL, eq. 2): 0, 2, 4 per direction
    gap = (F.normalize(p) - F.normalize(t)).square().sum(1)
    torch.testing.assert_close(2 + 2 * negative_cosine(p, t), gap)


def test_cosine_equals_torchs_and_the_target_is_a_constant():
    p, t = rows(7, 5).requires_grad_(), rows(7, 5, 1).requires_grad_()
    loss = negative_cosine(p, t)
    torch.testing.assert_close(loss, -F.cosine_similarity(p, t), atol=1e-12, rtol=0)
    loss.sum().backward()
    assert t.grad is None
    assert float(p.grad.abs().max()) > 0


# ---------------------------------------------------------------- queue


@pytest.mark.parametrize("size", [4, 65536])
def test_equal_similarities_give_the_log_of_the_queue_and_one(size):
    q, orthogonal = torch.eye(8)[:2], torch.eye(8)[2:3]
    loss = queue_nce(q, orthogonal.expand(2, 8), orthogonal.expand(size, 8), 0.2)
    assert loss.tolist() == pytest.approx([math.log(size + 1)] * 2, rel=1e-6)


def test_random_unit_vectors_start_at_the_published_value():
    """11.188 for 65,536 keys of 128 numbers at 0.2: ln(K + 1) + 1 / (2 d t^2)."""
    loss = queue_nce(unit(1024, 128, 0), unit(1024, 128, 1), unit(65536, 128, 2), 0.2)
    assert float(loss.mean()) == pytest.approx(11.188, abs=0.04)  # 0.014 is its deviation


def test_queue_nce_is_cross_entropy_over_one_and_k_logits():
    q, k, queue = rows(5, 6), rows(5, 6, 1), unit(9, 6, 2)
    own = (F.normalize(q) * F.normalize(k)).sum(1, keepdim=True)
    logits = torch.cat([own, F.normalize(q) @ queue.T], 1) / 0.07
    want = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(queue_nce(q, k, queue, 0.07), want, atol=1e-9, rtol=0)


def test_queue_nce_agrees_with_lightly():
    loss = pytest.importorskip("lightly.loss", reason="pip install --no-deps -r tests/peers.txt")
    q, k, queue = rows(5, 6).float(), rows(5, 6, 1).float(), unit(9, 6, 2).float()
    theirs = loss.NTXentLoss(temperature=0.2, memory_bank_size=(9, 6))
    theirs.memory_bank.bank = queue.clone()
    assert float(theirs(q, k)) == pytest.approx(float(queue_nce(q, k, queue, 0.2).mean()), abs=1e-6)


def test_keys_are_constants_and_entries_can_be_left_out():
    q, k = rows(2, 4).requires_grad_(), rows(2, 4, 1).requires_grad_()
    queue = unit(3, 4, 2)
    valid = torch.tensor([[True, True, True], [False, False, False]])
    loss = queue_nce(q, k, queue, 0.5, valid)
    assert float(loss[1].detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(loss[:1], queue_nce(q, k, queue, 0.5)[:1])
    loss.sum().backward()
    assert k.grad is None
    assert float(q.grad[0].abs().max()) > 0


# ---------------------------------------------------------------- cross-correlation


def test_barlow_equals_the_published_code():
    """nn.BatchNorm1d without affine, C = za^T zb / B, as in the authors' release."""
    a, b = (rows(16, 32) + 1).requires_grad_(), (3 * rows(16, 32, 1)).requires_grad_()
    norm = nn.BatchNorm1d(32, affine=False).double()
    c = norm(a).T @ norm(b) / 16
    on = (c.diagonal() - 1).square().sum()
    off = c[~torch.eye(32, dtype=torch.bool)].square().sum()
    want, got = on + LAMBDA * off, barlow(a, b)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    slopes = (torch.autograd.grad(loss, (a, b)) for loss in (got, want))
    torch.testing.assert_close(*slopes, atol=1e-9, rtol=0)


def test_barlow_agrees_with_lightly():
    loss = pytest.importorskip("lightly.loss", reason="pip install --no-deps -r tests/peers.txt")
    a, b = rows(16, 32), rows(16, 32, 1)
    want = loss.BarlowTwinsLoss(lambda_param=LAMBDA)(a, b)
    torch.testing.assert_close(barlow(a, b), want, atol=1e-6, rtol=0)


def test_equal_views_of_orthogonal_channels_have_no_loss():
    q = torch.linalg.qr(torch.cat([torch.ones(64, 1, dtype=torch.float64), rows(64, 8)], 1))[0]
    z = 10 * q[:, 1:]  # zero mean, orthogonal
    assert float(barlow(z, z)) == pytest.approx(0, abs=1e-6)


def test_independent_views_have_the_expected_loss():
    """D (1 + 1/B) + lambda D (D - 1) / B, which is 8196 + 167 at D = 8192, B = 2048."""
    rows_, width = 128, 64
    values = [float(barlow(rows(rows_, width, s), rows(rows_, width, s + 99))) for s in range(30)]
    want = width * (1 + 1 / rows_) + LAMBDA * width * (width - 1) / rows_
    assert sum(values) / 30 == pytest.approx(want, rel=0.01)
    published = 8192 * (1 + 1 / 2048) + LAMBDA * 8192 * 8191 / 2048
    assert published == pytest.approx(8196 + 167, abs=0.5)


def test_the_order_of_rows_counts_only_between_the_views():
    a = rows(64, 16)
    b = a + 0.1 * rows(64, 16, 1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(barlow(a[order], b[order]), barlow(a, b))
    torch.testing.assert_close(barlow(b, a), barlow(a, b))
    assert float(barlow(a[order], b)) > 10 * float(barlow(a, b))


def test_rows_that_are_not_valid_change_neither_loss_nor_gradient():
    a, b = rows(6, 4), rows(6, 4, 1)
    grads = []
    for more in (0, 3):
        x = torch.cat([a, torch.full((more, 4), torch.nan, dtype=a.dtype)]).requires_grad_()
        y = torch.cat([b, 7 + rows(more, 4, 2)])
        loss = barlow(x, y, torch.arange(6 + more) < 6)
        loss.backward()
        grads.append((loss.detach(), x.grad[:6]))
        assert not x.grad[6:].any()
    torch.testing.assert_close(grads[0], grads[1])


def test_both_views_get_a_gradient():
    a, b = rows(6, 4).requires_grad_(), rows(6, 4, 1).requires_grad_()
    barlow(a, b).backward()
    assert min(float(x.grad.abs().max()) for x in (a, b)) > 0


def test_all_is_fp32_under_autocast():
    """Rows of a layer in bf16 are widened; products stay exact enough for a temperature."""
    a, b, queue = rows(32, 64).float(), rows(32, 64, 1).float(), unit(256, 64, 2).float()
    want = queue_nce(a, b, queue, 0.07), cross_correlation(a, b, everyone(a))
    with torch.autocast("cpu", torch.bfloat16):
        got = queue_nce(a, b, queue, 0.07), cross_correlation(a, b, everyone(a))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
