"""Spans: the published fractions, equal counts, channels."""

import pytest
import torch
from torchaudio.models.wav2vec2.components import _compute_mask_indices

from mmssl.masking import channel_mask, equalise, span_mask


def runs_of(hidden):
    """Lengths of all runs of hidden tokens."""
    edges = torch.nn.functional.pad(hidden.long(), (1, 1)).diff(dim=1)
    return edges.eq(-1).nonzero()[:, 1] - edges.eq(1).nonzero()[:, 1]


@pytest.mark.parametrize(
    ("share", "fraction", "run"), [(0.65, 0.490, 14.7), (0.80, 0.566, 16.2), (0.5, 0.401, None)]
)
def test_spans_cover_the_published_fraction(share, fraction, run):
    hidden = span_mask(torch.arange(1000), 999, share / 10, 10, min_spans=2)
    assert hidden.double().mean().item() == pytest.approx(fraction, abs=0.01)
    assert hidden.double().mean().item() == pytest.approx(1 - (1 - share / 10) ** 10, abs=0.01)
    runs = runs_of(hidden)
    assert runs.min() >= 10
    if run is not None:
        assert runs.double().mean().item() == pytest.approx(run, abs=0.3)


def test_starts_are_distinct_counted_and_before_the_last_span():
    hidden = span_mask(torch.arange(20000), 40, 0.05, 1)  # spans of one token show their starts
    assert set(hidden.sum(1).tolist()) == {2}
    hidden = span_mask(torch.arange(20000), 30, 0.05, 1)
    count = hidden.sum(1)
    assert set(count.tolist()) == {1, 2}  # floor(1.5 + u)
    assert count.double().mean().item() == pytest.approx(1.5, abs=0.02)
    assert not hidden[:, -1].any()
    even = hidden[:, :-1].double().mean(0)
    assert (even - 1.5 / 29).abs().max() < 0.008
    assert (span_mask(torch.arange(50), 40, 0.01, 1, min_spans=7).sum(1) == 7).all()


def test_short_rows_are_hidden_whole_and_empty_ones_not_at_all():
    lengths = torch.arange(100) % 13
    valid = torch.arange(12) < lengths[:, None]
    hidden = span_mask(torch.arange(100), 12, 0.065, 10, valid_PN=valid)
    assert (hidden.sum(1) == lengths.clamp(max=10) + (hidden.sum(1) == 11).long()).all()
    assert (hidden.sum(1)[lengths == 11] == 10).all()  # one place to start: the last stays visible
    assert (hidden.sum(1)[lengths == 12] < 12).all()


def test_equalise_trims_to_the_smallest_count_of_the_batch():
    seeds = torch.arange(64)
    lengths = 100 + 5 * torch.arange(64)
    lengths[3] = 0
    valid = torch.arange(500) < lengths[:, None]
    hidden = span_mask(seeds, 500, 0.065, 10, valid_PN=valid)
    equal = equalise(hidden, seeds)
    counts = hidden.sum(1)
    least = counts[counts > 0].min()
    assert (equal.sum(1) == least * (counts > 0)).all()
    assert not (equal & ~hidden).any()
    # Which tokens stay is the row's own matter once the count is given.
    assert torch.equal(
        equalise(hidden[[5, int(counts.eq(least).nonzero()[0])]], seeds[[5, 5]])[0], equal[5]
    )
    # Tokens are trimmed evenly over the row.
    many = torch.ones(5001, 20, dtype=torch.bool)
    many[0, 5:] = False
    kept = equalise(many, torch.arange(5001))[1:].double().mean(0)
    assert (kept - 0.25).abs().max() < 0.03
    nothing = torch.zeros(3, 20, dtype=torch.bool)
    assert torch.equal(equalise(nothing, seeds[:3]), nothing)


def test_counts_agree_with_torchaudio():
    """torchaudio draws the same spans and trims its batch as `equalise` does."""
    torch.manual_seed(0)
    theirs, ours = [], []
    for i in range(40):
        mask = _compute_mask_indices((8, 499), None, 0.65, 10, min_masks=2)
        theirs.append(mask.double().mean())
        seeds = torch.arange(8) + 8 * i
        mask = equalise(span_mask(seeds, 499, 0.065, 10, min_spans=2), seeds)
        ours.append(mask.double().mean())
    assert abs(torch.stack(theirs).mean() - torch.stack(ours).mean()).item() < 0.006


def test_channel_spans():
    hidden = channel_mask(torch.arange(2000), 768, 0.5 / 64, 64)
    assert hidden.shape == (2000, 768)
    assert runs_of(hidden).min() >= 64
    # Six starts among 704 places: each channel escapes them with probability (1 - 64/704)^6.
    assert hidden[:, 64:704].double().mean().item() == pytest.approx(
        1 - (1 - 64 / 704) ** 6, abs=0.01
    )
    assert not channel_mask(torch.arange(50), 64, 0.0, 8).any()
    assert not torch.equal(
        hidden[:, :300], channel_mask(torch.arange(1, 2001), 768, 0.5 / 64, 64)[:, :300]
    )
