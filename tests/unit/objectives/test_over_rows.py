"""CPC's negatives from all rows, and its softmax of dot products."""

import math

import pytest
import torch

from mmssl.objectives.frames import Negatives, draw_over_rows, frame_dot_nce


def drawn(lengths, seeds, frames=6, count=4000, mine=None):
    lengths, seeds = torch.tensor(lengths), torch.tensor(seeds)
    own = seeds[lengths > 0] if mine is None else torch.tensor(mine)
    return draw_over_rows(own, frames, lengths, seeds, count)


def test_every_frame_of_every_row_but_the_own_number():
    rows, frames = drawn([6, 0, 4, 6], [11, 12, 13, 14])
    for p in range(3):
        for t in range(6):
            pairs = set(zip(rows[p, t].tolist(), frames[p, t].tolist(), strict=True))
            lengths = {0: 6, 2: 4, 3: 6}
            assert pairs == {(g, n) for g, T in lengths.items() for n in range(T) if n != t % T}


def test_uniform_over_rows_and_then_over_frames():
    rows, frames = drawn([6, 4, 6], [1, 2, 3], count=30_000, mine=[5])
    shares = torch.bincount(rows[0, 2], minlength=3) / 30_000
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.015)
    of_short = torch.bincount(frames[0, 2][rows[0, 2] == 1], minlength=4) / 10_000
    assert of_short.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.02)


def test_neither_the_order_of_rows_nor_padding_changes_a_draw():
    rows, frames = drawn([6, 4, 5], [1, 2, 3], mine=[1])
    others, same = drawn([5, 0, 6, 4], [3, 9, 1, 2], mine=[1])
    assert torch.equal(torch.tensor([1, 2, 3])[rows], torch.tensor([3, 9, 1, 2])[others])
    assert torch.equal(frames, same)
    longer, at = drawn([6, 4, 5], [1, 2, 3], frames=9, mine=[1])
    assert torch.equal(longer[:, :6], rows)
    assert torch.equal(at[:, :6], frames)


def test_a_row_of_one_frame_gives_that():
    _, frames = drawn([1, 1], [1, 2], frames=1, count=50)
    assert frames.eq(0).all()


def test_the_softmax_is_the_formula():
    torch.manual_seed(0)
    context, positive, pool = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    negatives = Negatives(torch.randint(7, (2, 5, 20)), torch.ones(2, 5, dtype=torch.bool))
    negatives.asked_PM[1, 3] = False
    total, hits = 0.0, 0
    for p in range(2):
        for t in range(5):
            if not negatives.asked_PM[p, t]:
                continue
            own = context[p, t] @ positive[p, t] / 4
            other = pool[p, negatives.index_PMK[p, t]] @ context[p, t] / 4
            total += float(torch.cat([own[None], other]).logsumexp(0) - own)
            hits += bool(own > other.max())
    loss = frame_dot_nce(context, positive, pool, negatives, temperature=4.0)
    assert float(loss.sum) == pytest.approx(total, rel=1e-5)
    assert (int(loss.count), int(loss.correct)) == (9, hits)
    empty = frame_dot_nce(context * 0, positive, pool, negatives)
    assert float(empty.sum / empty.count) == pytest.approx(math.log(21), abs=1e-6)
