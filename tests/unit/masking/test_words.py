"""Masks of text: BERT, ALBERT, ELECTRA."""

import pytest
import torch

from mmssl.masking import IdAlteration, corrupt_tokens, ngram_mask, token_mask
from mmssl.rng import row_uniform

ROWS = torch.arange(1000)


def share(part):
    return part.double().mean().item()


def test_bert_chooses_15_percent_and_splits_them_80_10_10():
    ids = 1000 + torch.arange(128).repeat(1000, 1)  # 126,000 candidates
    candidates = torch.ones_like(ids, dtype=torch.bool)
    candidates[:, 0] = candidates[:, -1] = False
    chosen = token_mask(ROWS, 128, 0.15, valid_PN=candidates)
    assert share(chosen[candidates]) == pytest.approx(0.15, abs=0.005)
    assert not chosen[~candidates].any()
    out = corrupt_tokens(ids, chosen, ROWS, 103, (1000, 30522))
    assert torch.equal(out[~chosen], ids[~chosen])
    masked, kept = out[chosen] == 103, out[chosen] == ids[chosen]
    assert share(masked) == pytest.approx(0.8, abs=0.01)
    assert share(kept) == pytest.approx(0.1, abs=0.01)
    assert share(~masked & ~kept) == pytest.approx(0.1, abs=0.01)


def test_corruption_follows_the_shares():
    ids = torch.full((2000, 20), 7)
    hidden = token_mask(torch.arange(2000), 20, 0.5)
    out = corrupt_tokens(ids, hidden, torch.arange(2000), 3, (10, 60))
    assert (out[~hidden] == 7).all()
    changed = out[hidden]
    assert share(changed == 3) == pytest.approx(0.8, abs=0.01)
    assert share(changed == 7) == pytest.approx(0.1, abs=0.01)
    random_ids = changed[(changed != 3) & (changed != 7)]
    assert random_ids.unique().tolist() == list(range(10, 60))
    every = corrupt_tokens(ids, hidden, torch.arange(2000), 3, (10, 60), shares=(1.0, 0.0))
    assert (every[hidden] == 3).all()


def test_electra_masks_85_percent_of_15_percent():
    ids = torch.full((1000, 128), 7)
    chosen = token_mask(ROWS, 128, 0.15)
    out = corrupt_tokens(ids, chosen, ROWS, 3, (10, 60), shares=(0.85, 0.0))
    assert share(chosen) == pytest.approx(0.15, abs=0.005)
    assert share(out[chosen] == 3) == pytest.approx(0.85, abs=0.01)
    assert (out[~chosen] == 7).all()
    assert (out[out != 3] == 7).all()


def test_draws_with_replacement_hide_the_tokens_that_differ():
    candidates = torch.ones(4000, 128, dtype=torch.bool)
    candidates[:, ::4] = False  # 96 candidates, 14 draws
    chosen = token_mask(torch.arange(4000), 128, 0.15, replacement=True, valid_PN=candidates)
    assert not chosen[~candidates].any()
    assert chosen.sum(1).max() == 14
    assert share(chosen[candidates]) == pytest.approx(1 - (1 - 1 / 96) ** 14, abs=0.001)
    even = chosen.double().mean(0)[1::4]
    assert (even - even.mean()).abs().max() < 0.03
    assert torch.equal(
        token_mask(ROWS[:9], 5, 0.01, replacement=True).sum(1), torch.ones(9, dtype=torch.long)
    )


# ---------------------------------------------------------------- n-grams


def test_ngram_lengths_have_shares_of_one_half_third():
    """Three tokens of 400 are hidden: which runs they form tells the first draws.

    3: 0.182. 2 first: 0.273, then one more. 1 first: 0.545, then 2 (drawn 2 or 3, shortened) or 1.
    """
    hidden = ngram_mask(torch.arange(6000), 400, torch.ones(6000, 400).bool(), ratio=3 / 400)
    assert (hidden.sum(1) == 3).all()
    pairs = (hidden[:, 1:] & hidden[:, :-1]).sum(1)
    one, two, three = 6 / 11, 3 / 11, 2 / 11
    by_chance = 0.02  # runs that touch
    assert share(pairs == 2) == pytest.approx(three, abs=by_chance)
    assert share(pairs == 1) == pytest.approx(two + one * (two + three), abs=by_chance)
    assert share(pairs == 0) == pytest.approx(one * one, abs=by_chance)
    assert one == pytest.approx(0.545, abs=0.001)
    assert two == pytest.approx(0.273, abs=0.001)
    assert three == pytest.approx(0.182, abs=0.001)


def test_ngrams_hide_whole_words_and_15_percent():
    begins = row_uniform(ROWS, 128, "words") < 0.7
    valid = (torch.arange(128) > 0) & (torch.arange(128) < (40 + ROWS % 80)[:, None])
    hidden = ngram_mask(ROWS, 128, begins, valid_PN=valid)
    assert not (hidden & ~valid).any()
    assert share(hidden[valid]) == pytest.approx(0.15, abs=0.005)
    budget = (0.15 * valid.sum(1).double()).round()
    assert (hidden.sum(1) <= budget).all()
    first = valid & (begins | (torch.arange(128) == 1))
    word = first.cumsum(1)
    for row in range(200):
        for w in word[row][hidden[row]].unique():
            members = (word[row] == w) & valid[row]
            assert hidden[row][members].all()
    # every word is as likely as another
    even = ngram_mask(torch.arange(8000), 64, torch.ones(8000, 64).bool()).double().mean(0)
    assert (even[3:-3] - even[3:-3].mean()).abs().max() < 0.025


def test_single_words_and_rows_without_room():
    """`longest=1` is whole-word masking; a word longer than the budget is never cut."""
    begins = torch.arange(40) % 2 == 0
    hidden = ngram_mask(ROWS, 40, begins.expand(1000, -1), longest=1)
    assert (hidden.sum(1) == 6).all()
    assert torch.equal(hidden[:, ::2], hidden[:, 1::2])
    assert not ngram_mask(ROWS, 40, (torch.arange(40) == 0).expand(1000, -1)).any()
    none = torch.zeros(1000, 40, dtype=torch.bool)
    assert not ngram_mask(ROWS, 40, none, valid_PN=none).any()
    with pytest.raises(ValueError, match=r"begins \(1000, 39\)"):
        ngram_mask(ROWS, 40, none[:, 1:])


def test_an_alteration_spares_special_ids_and_draws_ordinary_ones():
    special = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
    ids = torch.tensor([[2, 9, 1, 7, 3, 0]]).expand(500, -1)
    alter = IdAlteration(12, special, (0.4, 0.5))
    assert alter.candidates(ids)[0].tolist() == [False, True, False, True, False, False]
    hidden = alter.candidates(ids)
    read = alter(ids, hidden, torch.arange(500))
    assert torch.equal(read[~hidden], ids[~hidden])
    assert set(read[hidden].tolist()) == {4, *range(5, 12)}
    assert torch.equal(read, corrupt_tokens(ids, hidden, torch.arange(500), 4, (5, 12), (0.4, 0.5)))
