"""Rows that are mixed with a row: of other sources, whatever ranks hold them."""

import torch

from mmssl.objectives.negatives import companions

SOURCE = torch.tensor([7, 7, 8, 9, 9, 10, 11, 12])
SEEDS = torch.arange(8) * 1_000_003 + 5
PRESENT = torch.tensor([True] * 7 + [False])


def drawn(order=range(8), count=3, stream="x"):
    """Rows, named as in SOURCE, that each row is given, with the gathered rows in an order."""
    order = torch.tensor(list(order))
    index, found = companions(
        SOURCE, SEEDS, SOURCE[order], SEEDS[order], PRESENT[order], count, stream
    )
    return order[index], found


def test_sources_differ_and_absent_rows_are_left_out():
    index, found = drawn()
    assert found.tolist() == [True] * 8  # an absent row may ask; its answer is not used
    for row, others in enumerate(index.tolist()):
        sources = [int(SOURCE[row]), *(int(SOURCE[i]) for i in others)]
        assert len(set(sources)) == 4 or row == 7
        assert 7 not in others


def test_the_place_of_a_row_does_not_matter():
    index, _ = drawn()
    shuffled, _ = drawn([5, 2, 7, 0, 6, 4, 1, 3])
    assert torch.equal(index, shuffled)
    assert not torch.equal(index, drawn(stream="y")[0])


def test_too_few_sources_are_told():
    _, found = drawn(count=4)  # 7, 8, 9, 10, 11: four others for each of them
    assert found[:7].all()
    assert not drawn(count=5)[1][:7].any()


def test_every_other_source_comes_up():
    seeds = torch.arange(3000) * 7919
    own = torch.full_like(seeds, 7)
    index, _ = companions(own, seeds, SOURCE, SEEDS, PRESENT, 1, "x")
    counts = torch.bincount(index[:, 0], minlength=8).tolist()
    assert counts[0] == counts[1] == counts[7] == 0
    assert all(500 < c < 700 for c in counts[2:7])  # five rows, 600 each
