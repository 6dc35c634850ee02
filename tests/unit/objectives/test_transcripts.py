"""CTC: the count of alignments, what does not count, and agreement with brute force."""

import itertools
import math

import pytest
import torch

from mmssl.objectives.transcripts import ctc


def one(logits, ids, frames=None):
    frames = torch.tensor([logits.shape[1] if frames is None else frames])
    return ctc(logits, frames, torch.tensor([ids]), torch.tensor([len(ids)]))


def test_equal_logits_count_the_alignments():
    """Zero head, 50 frames, 32 classes, 10 symbols without equal neighbours."""
    loss, counts = one(torch.zeros(1, 50, 32), list(range(1, 11)))
    assert float(loss) == pytest.approx(50 * math.log(32) - math.log(math.comb(60, 20)), abs=1e-3)
    assert float(loss) == pytest.approx(137.315, abs=1e-3)
    assert counts.tolist() == [True]


def test_the_chance_is_the_sum_over_all_alignments():
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 5, 3).double(), [2, 2]
    p = logits[0].softmax(-1)
    total = 0.0
    for path in itertools.product(range(3), repeat=5):
        if [k for k, _ in itertools.groupby(path) if k] == ids:
            total += math.prod(float(p[t, k]) for t, k in enumerate(path))
    assert float(one(logits, ids)[0]) == pytest.approx(-math.log(total), rel=1e-9)


def test_what_does_not_count_costs_nothing_and_sends_finite_zeros():
    """No transcript; too many symbols; equal neighbours without a frame for the blank; no frame."""
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 6, requires_grad=True)
    ids = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0], [1, 2, 3, 4], [1, 1, 2, 2], [1, 0, 0, 0]])
    symbols, frames = torch.tensor([3, 0, 4, 4, 1]), torch.tensor([4, 4, 3, 4, 0])
    loss, counts = ctc(logits, frames, ids, symbols)
    assert counts.tolist() == [True, False, False, False, False]
    assert float(loss[1:].abs().sum()) == 0.0
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1:].any()
    assert logits.grad[0].any()


def test_frames_and_symbols_behind_an_end_change_nothing():
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 6, 5), torch.tensor([[3, 1, 1, 1]])
    short = ctc(logits[:, :4], torch.tensor([4]), ids[:, :2], torch.tensor([2]))
    padded = ctc(logits, torch.tensor([4]), ids, torch.tensor([2]))
    assert torch.equal(short[0], padded[0])
    assert padded[1].tolist() == [True]
