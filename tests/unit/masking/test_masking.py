"""Laws of the mask rules."""

import pytest
import torch

from mmssl import masking
from mmssl.masking import (
    beit_block_mask,
    block_mask,
    ngram_mask,
    random_mask,
    span_mask,
    token_mask,
    tube_mask,
)
from mmssl.rng import row_uniform

SEEDS = torch.arange(400)


def begins(seeds, n):
    """Words of one to four tokens, drawn from the rows' seeds."""
    return row_uniform(seeds, n, "words") < 0.6


CALLS = {
    "random": lambda s, v=None: random_mask(s, (8, 6), 0.8, valid_PN=v),
    "blocks": lambda s, v=None: block_mask(s, (8, 6), 0.8, (3, 2), valid_PN=v),
    "beit_blocks": lambda s, v=None: beit_block_mask(s, (8, 6), 0.6, 4, valid_PN=v),
    "tubes": lambda s, v=None: tube_mask(s, (2, 4, 6), 0.5, valid_PN=v),
    "spans": lambda s, v=None: span_mask(s, 48, 0.065, 10, valid_PN=v),
    "words": lambda s, v=None: token_mask(s, 48, 0.15, valid_PN=v),
    "ngrams": lambda s, v=None: ngram_mask(s, 48, begins(s, 48), 0.15, valid_PN=v),
}


def test_every_rule_is_in_the_table() -> None:
    assert set(masking.RULES) == {"all", *CALLS}


def test_all_hides_what_may_be_hidden() -> None:
    valid = torch.arange(48) < (torch.arange(400) % 49)[:, None]
    assert torch.equal(masking.all_mask(SEEDS, 48, valid_PN=valid), valid)
    assert bool(masking.all_mask(SEEDS, (8, 6)).all())


@pytest.mark.parametrize("name", sorted(CALLS))
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    whole = CALLS[name](SEEDS)
    assert whole.shape == (400, 48)
    assert whole.dtype == torch.bool
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CALLS[name](SEEDS[order]), whole[order])
    assert torch.equal(CALLS[name](SEEDS[7:8]), whole[7:8])
    assert torch.equal(CALLS[name](SEEDS, torch.ones(400, 48, dtype=torch.bool)), whole)
    assert whole.unique(dim=0).shape[0] > 200


@pytest.mark.parametrize("name", sorted(CALLS))
def test_padding_is_never_hidden(name: str) -> None:
    lengths = torch.arange(400) % 49
    valid = torch.arange(48) < lengths[:, None]
    hidden = CALLS[name](SEEDS, valid)
    assert not (hidden & ~valid).any()
    if name in ("random", "blocks", "beit_blocks"):
        ratio = 0.6 if name == "beit_blocks" else 0.8
        assert hidden.sum(1).tolist() == [round(ratio * n) for n in lengths.tolist()]
    if name == "words":
        expected = [min(n, max(1, round(0.15 * n))) for n in lengths.tolist()]
        assert hidden.sum(1).tolist() == expected
    if name == "spans":
        assert torch.equal(hidden.any(1), lengths > 0)
        assert hidden[10].sum() == 10  # as long as a span: hidden whole
        assert hidden[4].sum() == 4


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("random", (0.8,)),
        ("blocks", (0.8, (3, 2))),
        ("beit_blocks", (0.6, 4)),
        ("spans", (0.065, 10)),
        ("words", (0.15,)),
        ("words", (0.15, True)),
    ],
)
def test_longer_padding_changes_nothing(name: str, constants: tuple[object, ...]) -> None:
    rule = masking.RULES[name]
    valid = (torch.arange(48) < 30).expand(400, -1)
    long = rule(SEEDS, (8, 6), *constants, valid_PN=valid)
    assert torch.equal(long[:, :30], rule(SEEDS, (5, 6), *constants))


def test_ngrams_do_not_depend_on_padding() -> None:
    valid = (torch.arange(48) < 30).expand(400, -1)
    words = begins(SEEDS, 48)
    long = ngram_mask(SEEDS, 48, words, valid_PN=valid)
    assert torch.equal(long[:, :30], ngram_mask(SEEDS, 30, words[:, :30]))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 1.0])
def test_random_mask_hides_an_exact_share_evenly(ratio: float) -> None:
    hidden = random_mask(torch.arange(4000), 25, ratio)
    assert (hidden.sum(1) == round(ratio * 25)).all()
    share = round(ratio * 25) / 25
    error = 5 * (share * (1 - share) / 4000) ** 0.5
    assert (hidden.double().mean(0) - share).abs().max() <= error


@pytest.mark.parametrize("inverse", [True, False])
def test_blocks_hide_an_exact_share_in_rectangles_evenly(inverse: bool) -> None:
    hidden = block_mask(torch.arange(4000), (12, 9), 0.8, (4, 3), inverse=inverse)
    assert (hidden.sum(1) == round(0.8 * 108)).all()
    assert (hidden.double().mean(0) - 86 / 108).abs().max() < 0.035
    # Neighbours agree far more often than under a random mask (chance 0.68).
    grid = hidden.reshape(-1, 12, 9)
    assert (grid[:, 1:] == grid[:, :-1]).double().mean() > 0.8
    alone = block_mask(torch.arange(50), (12, 9), 1 - 12 / 108, (4, 3)).reshape(-1, 12, 9)
    rows, columns = (~alone).any(2).sum(1), (~alone).any(1).sum(1)
    whole = (rows == 4) & (columns == 3)
    assert whole.sum() > 10  # a first rectangle that lies inside the grid shows complete


def test_tubes_hide_the_same_cells_at_all_times() -> None:
    hidden = tube_mask(SEEDS, (4, 7, 7), 0.9).reshape(400, 4, 49)
    assert torch.equal(hidden, hidden[:, :1].expand(-1, 4, -1))
    assert (hidden[:, 0].sum(1) == round(0.9 * 49)).all()


def test_streams_differ_and_bad_shapes_are_named() -> None:
    first = random_mask(SEEDS, 30, 0.5)
    assert not torch.equal(first, random_mask(SEEDS, 30, 0.5, stream="second"))
    with pytest.raises(ValueError, match="2 axes"):
        block_mask(SEEDS, (2, 3, 4), 0.5)
    with pytest.raises(ValueError, match="2 axes"):
        beit_block_mask(SEEDS, (12,), 0.5)
    with pytest.raises(ValueError, match="time, height, width"):
        tube_mask(SEEDS, (3, 4), 0.5)
    with pytest.raises(ValueError, match="does not match"):
        random_mask(SEEDS, 30, 0.5, valid_PN=torch.ones(400, 29, dtype=torch.bool))
