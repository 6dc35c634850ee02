"""Cross-entropy, token prediction and accuracy counters."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmssl.objectives import classification as cls


def test_softmax_equals_torch_and_skips_invalid_rows() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 3, -100, 1, 2])  # the third is out of range and not valid
    valid = target >= 0
    loss = cls.softmax_cross_entropy(logits, target, valid, smoothing=0.1)
    expected = F.cross_entropy(logits[valid], target[valid], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss[valid], expected)
    assert loss[2] == 0
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[2].abs().sum() == 0
    flat = cls.softmax_cross_entropy(torch.zeros(3, 7), torch.tensor([1, 2, 3]))
    assert flat.tolist() == pytest.approx([math.log(7)] * 3)


def test_binary_equals_two_class_softmax() -> None:
    pair = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    valid = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = cls.binary_cross_entropy(pair[:, 1] - pair[:, 0], target.bool(), valid)
    torch.testing.assert_close(got, cls.softmax_cross_entropy(pair, target, valid))
    assert cls.binary_cross_entropy(torch.zeros(1), torch.ones(1)).item() == pytest.approx(
        math.log(2)
    )


def test_token_loss_counts_hidden_places_only() -> None:
    logits = torch.zeros(2, 3, 11, requires_grad=True)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    hidden = torch.tensor([[True, False, True], [False, False, False]])
    total, count = cls.token_cross_entropy(logits, ids, hidden)
    assert total.item() == pytest.approx(2 * math.log(11))
    assert count.item() == 2
    total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, hidden)
    none, zero = cls.token_cross_entropy(logits, ids, torch.zeros_like(hidden))
    assert (none.item(), zero.item()) == (0, 0)


def test_accuracy_counts_ties_as_misses() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 3.0], [5.0, 0.0, 0.0]])
    target = torch.tensor([0, 0, 2, 1])
    assert [x.item() for x in cls.correct(logits, target)] == [2, 4]
    valid = torch.tensor([True, True, False, True])
    assert [x.item() for x in cls.correct(logits, target, valid)] == [1, 3]
    collapsed = cls.correct(torch.zeros(2, 5, 9), torch.zeros(2, 5, dtype=torch.int64))
    assert [x.item() for x in collapsed] == [0, 10]
    yes_no = torch.tensor([1.0, -1.0, 0.0, 0.0, 2.0])
    right = torch.tensor([True, False, True, False, False])
    assert [x.item() for x in cls.correct_binary(yes_no, right)] == [2, 5]
    assert [x.item() for x in cls.correct_binary(yes_no, right, right)] == [1, 2]
