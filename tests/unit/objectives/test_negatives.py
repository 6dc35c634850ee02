"""Laws of the choice of negatives."""

import pytest
import torch

from mmssl.objectives import negatives as neg


def _ids(n: int, sources: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    source = torch.cat([torch.arange(sources), torch.randint(sources, (n - sources,), generator=g)])
    return source, torch.randint(2**62, (n,), generator=g)


@pytest.mark.parametrize("sources", [64, 20, 3])
def test_partners_are_a_permutation_over_other_sources(sources: int) -> None:
    source, seeds = _ids(64, sources)
    partner, found = neg.partners(source, seeds)
    assert found.all()
    assert (source[partner] != source).all()
    assert partner.sort().values.tolist() == list(range(64))


def test_partners_are_spread_evenly_over_seeds() -> None:
    source = torch.arange(5)
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        partner, _ = neg.partners(source, torch.arange(5) + 5 * seed)
        counts[source, partner] += 1
    assert counts.diagonal().sum() == 0
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert (off - 500).abs().max() < 5 * 500**0.5


def test_partners_depend_on_rows_not_on_their_layout() -> None:
    source, seeds = _ids(32, 20)
    partner, _ = neg.partners(source, seeds)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    moved, _ = neg.partners(source[order], seeds[order])
    assert torch.equal(order[moved], partner[order])
    # Absent rows in between, some of them of present sources.
    place = torch.arange(32) * 2
    wide_source, wide_seeds = torch.full((64,), 3), torch.arange(64)
    wide_source[place], wide_seeds[place] = source, seeds
    present = torch.zeros(64, dtype=torch.bool)
    present[place] = True
    spread, found = neg.partners(wide_source, wide_seeds, present)
    assert torch.equal(spread[place], place[partner])
    assert torch.equal(found, present)
    assert torch.equal(spread[~present], torch.arange(64)[~present])
    assert not torch.equal(neg.partners(source, seeds, stream="second")[0], partner)


def test_rows_without_another_source_find_no_partner() -> None:
    seeds = torch.arange(6)
    partner, found = neg.partners(torch.zeros(6, dtype=torch.int64), seeds)
    assert not found.any()
    assert partner.tolist() == list(range(6))
    assert not neg.partners(torch.tensor([1]), seeds[:1])[1].any()
    assert neg.partners(torch.arange(6), seeds, torch.zeros(6, dtype=torch.bool))[1].sum() == 0
    assert neg.partners(torch.arange(0), torch.arange(0))[0].shape == (0,)
    source = torch.tensor([0, 0, 0, 0, 1, 2])
    partner, found = neg.partners(source, seeds)
    assert (source[partner[found]] != source[found]).all()
    assert found[4:].all()


def test_coin_is_fair_and_layout_free() -> None:
    seeds = torch.arange(20000)
    heads = neg.coin(seeds)
    assert heads.double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert torch.equal(neg.coin(seeds[7:9]), heads[7:9])
    assert neg.coin(seeds, 0.25).double().mean().item() == pytest.approx(0.25, abs=0.015)


def test_hardest_and_its_share() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.9, 0.7], [0.3, 0.2, 0.9]])
    negative = ~torch.eye(3, dtype=torch.bool)
    negative[0, 1] = False
    negative[2] = False
    index, found = neg.hardest(scores, negative)
    assert index.tolist() == [2, 2, 0]
    assert found.tolist() == [True, True, False]

    n = 10000
    yes = torch.ones(n, dtype=torch.bool)
    easy = (torch.zeros(n, dtype=torch.int64), yes)
    hard = (torch.ones(n, dtype=torch.int64), yes)
    index, found, is_hard = neg.mix_hard(easy, hard, torch.arange(n), 0.25)
    assert found.all()
    assert torch.equal(index == 1, is_hard)
    assert is_hard.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not neg.mix_hard(easy, hard, torch.arange(n), 0.0)[2].any()
    assert neg.mix_hard(easy, hard, torch.arange(n), 1.0)[2].all()
    only_easy = neg.mix_hard(easy, (hard[0], ~yes), torch.arange(n), 1.0)
    assert only_easy[0].sum() == 0
    assert only_easy[1].all()
    only_hard = neg.mix_hard((easy[0], ~yes), hard, torch.arange(n), 0.25)
    assert only_hard[0].sum() == n
    assert only_hard[1].all()
