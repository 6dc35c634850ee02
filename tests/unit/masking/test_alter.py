"""Altered frames: Mockingjay, TERA, SpecAugment."""

import math

import pytest
import torch
from torchaudio.transforms import FrequencyMasking, TimeMasking

from mmssl.masking import (
    FrameAlteration,
    FrequencyBand,
    MagnitudeNoise,
    SpecMasks,
    TimeSpans,
)

PARTS = {
    "mockingjay": {"time": TimeSpans()},
    "albert": {"time": TimeSpans(length=1)},
    "tera": {"time": TimeSpans(), "frequency": FrequencyBand(), "noise": MagnitudeNoise(0.5)},
    "band": {"frequency": FrequencyBand()},
    "noise": {"noise": MagnitudeNoise(0.5)},
    "dapc": {"masks": SpecMasks(2, 5, 2, 40)},
}


def frames(rows, steps, features, seed=0):
    return torch.randn(rows, steps, features, generator=torch.Generator().manual_seed(seed))


def batch(rows=60, steps=50, features=10):
    lengths = torch.arange(rows) % (steps + 1)
    x = frames(rows, steps, features)
    return x.masked_fill(torch.arange(steps)[:, None] >= lengths[:, None, None], 0.0), lengths


@pytest.mark.parametrize("name", PARTS)
def test_laws_of_every_alteration(name):
    """Own seed and length alone; padding untouched and uncounted; a loss in every row."""
    alter = FrameAlteration(**PARTS[name])
    x, lengths = batch()
    seeds = torch.arange(60)
    valid = torch.arange(50) < lengths[:, None]
    before = x.clone()
    out, loss = alter(x, lengths, seeds)
    assert torch.equal(x, before)
    assert torch.equal(out[~valid], x[~valid])
    assert not loss[~valid].any()
    assert torch.equal(loss.flatten(1).any(1), lengths > 0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = alter(x[order], lengths[order], seeds[order])
    assert torch.equal(shuffled.x_PTF, out[order])
    assert torch.equal(shuffled.loss_PTF, loss[order])
    alone = alter(x[17:18, :17], lengths[17:18], seeds[17:18])
    assert torch.equal(alone.x_PTF, out[17:18, :17])
    assert torch.equal(alone.loss_PTF, loss[17:18, :17])
    longer = alter(torch.nn.functional.pad(x, (0, 0, 0, 100)), lengths, seeds)
    assert torch.equal(longer.x_PTF[:, :50], out)
    assert not longer.x_PTF[:, 50:].any()
    assert torch.equal(longer.loss_PTF[:, :50], loss)
    assert not longer.loss_PTF[:, 50:].any()
    assert not torch.equal(alter(x, lengths, seeds, "again").x_PTF, out)
    assert alter(x.bfloat16(), lengths, seeds).x_PTF.dtype == torch.bfloat16


def test_an_alteration_needs_a_part():
    with pytest.raises(ValueError, match="at least one of time, frequency, masks, noise"):
        FrameAlteration()


# ---------------------------------------------------------------- time


def coverage(steps, share=0.15, length=7):
    """Expected share of chosen frames: n distinct starts among steps - length places."""
    places, n = steps - length, round(share * steps / length)
    seen = 0.0
    for t in range(steps):
        covering = min(t, places - 1) - max(0, t - length + 1) + 1
        seen += math.comb(places - covering, n) / math.comb(places, n)
    return 1 - seen / steps


@pytest.mark.parametrize("steps", [200, 300, 500, 1000, 1500])
def test_mockingjay_covers_13_to_14_and_a_half_percent(steps):
    """Overlaps cost one percent; the rounding of the number of spans moves short utterances."""
    alter, seeds = FrameAlteration(time=TimeSpans()), torch.arange(300)
    lengths = torch.full((300,), steps)
    _, loss = alter(torch.ones(300, steps, 1), lengths, seeds)
    chosen = loss.double().mean().item()
    assert 0.132 <= chosen <= 0.146
    assert chosen == pytest.approx(coverage(steps), abs=0.0025)
    starts = TimeSpans().starts(lengths, steps, seeds, "x")
    assert (starts.sum(1) == round(0.15 * steps / 7)).all()
    assert not starts[:, steps - 7 :].any()


def test_one_dice_per_utterance_says_zero_swap_or_nothing():
    x = 1 + torch.arange(100.0)[None, :, None] + frames(4000, 1, 2).abs() * 1e-3
    lengths = torch.full((4000,), 100)
    out, loss = FrameAlteration(time=TimeSpans())(x, lengths, torch.arange(4000))
    chosen = loss.all(2)
    assert torch.equal(loss.any(2), chosen)
    assert torch.equal(out[~chosen], x[~chosen])
    zero = ((out == 0).all(2) == chosen).all(1)
    same = (out == x).flatten(1).all(1)
    assert zero.double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert same.double().mean().item() == pytest.approx(0.1, abs=0.015)
    assert not (zero & same).any()
    swapped = out[~zero & ~same]
    mine = x[~zero & ~same]
    source = swapped[:, :, 0].floor().long() - 1  # which frame of the row stands here
    assert torch.equal(swapped, mine.gather(1, source[:, :, None].expand_as(mine)))
    picked = chosen[~zero & ~same]
    # Inside a run without overlap a donor span is copied in order.
    steps = source.diff(dim=1)[picked[:, 1:] & picked[:, :-1]]
    assert (steps == 1).double().mean() > 0.85
    moved = (source - torch.arange(100))[picked]
    assert (moved == 0).double().mean() < 0.05
    assert source[picked].min() == 0
    assert source[picked].max() == 98  # donors start where spans may start


def test_white_noise_floors():
    """The best guess in white noise is the frame that is read: 0.798 zeroed, 0.751 with the mix.

    0.8 * sqrt(2 / pi) + 0.1 * 2 / sqrt(pi) + 0.1 * 0.
    """
    x = frames(6000, 150, 2)
    lengths = torch.full((6000,), 150)
    for time, floor in (
        (TimeSpans(zero=1.0, swap=0.0), math.sqrt(2 / math.pi)),
        (TimeSpans(), 0.8 * math.sqrt(2 / math.pi) + 0.2 / math.sqrt(math.pi)),
    ):
        out, loss = FrameAlteration(time=time)(x, lengths, torch.arange(6000))
        assert (out - x)[loss].abs().mean().item() == pytest.approx(floor, abs=0.012)
    assert floor == pytest.approx(0.751, abs=0.001)


# ---------------------------------------------------------------- frequency and noise


def test_bands_are_eight_wide_on_average():
    band = FrequencyBand().bands(80, torch.arange(10_000), "f")
    width = band.sum(1)
    assert width.double().mean().item() == pytest.approx(8.0, abs=0.2)
    assert sorted(width.unique().tolist()) == list(range(17))
    edges = torch.nn.functional.pad(band.long(), (1, 1)).diff(dim=1).abs().sum(1)
    assert set(edges.tolist()) == {0, 2}  # one band, or none
    assert band[:, 0].any()
    assert band[:, -1].any()


def test_tera_alters_a_part_of_its_loss_cells_and_no_padding():
    """Without noise: exactly the loss cells where the dice said zero."""
    x, lengths = batch(200, 50, 20)
    x = x + 10 * (torch.arange(50) < lengths[:, None])[:, :, None]  # no valid cell is 0
    time, seeds = TimeSpans(), torch.arange(200)
    alter = FrameAlteration(time=time, frequency=FrequencyBand())
    out, loss = alter(x, lengths, seeds)
    changed = out != x
    assert not (changed & ~loss).any()
    zeroed = FrameAlteration(time=TimeSpans(zero=1.0, swap=0.0), frequency=FrequencyBand())
    out, cells = zeroed(x, lengths, seeds)
    assert torch.equal(cells, loss)
    assert torch.equal(out != x, loss)
    band = FrameAlteration(frequency=FrequencyBand())(x, lengths, seeds, "alter")
    spans = FrameAlteration(time=time)(x, lengths, seeds, "alter")
    altered = (band.x_PTF != x) & (lengths > 0)[:, None, None]
    assert torch.equal(altered | spans.loss_PTF, loss)


def test_noise_alone_counts_all_valid_cells():
    x, lengths = batch(2000, 30, 12)
    out, loss = FrameAlteration(noise=MagnitudeNoise())(x, lengths, torch.arange(2000))
    valid = (torch.arange(30) < lengths[:, None])[:, :, None]
    assert torch.equal(loss, valid.expand_as(loss))
    noise = out - x
    noisy = (noise != 0).flatten(1).any(1)
    assert noisy[lengths > 0].double().mean().item() == pytest.approx(0.15, abs=0.025)
    values = noise[noisy][valid.expand_as(x)[noisy]]
    assert values.mean().item() == pytest.approx(0.0, abs=0.003)
    assert values.std().item() == pytest.approx(0.2, abs=0.002)
    assert (values.abs() < 0.2).double().mean().item() == pytest.approx(0.6827, abs=0.005)


# ---------------------------------------------------------------- SpecAugment


@pytest.mark.parametrize(
    ("policy", "steps", "fraction"),
    [
        (SpecMasks(1, 27, 1, 100), 1000, 0.211),
        (SpecMasks(2, 27, 2, 100), 1000, 0.374),
        (SpecMasks(2, 27, 2, 100), 300, 0.513),
    ],
)
def test_policies_hide_the_published_fraction(policy, steps, fraction):
    seeds, lengths = torch.arange(5000), torch.full((5000,), steps)
    bands = policy.features(80, seeds, "s").double().mean(1)
    spans = policy.frames(lengths, steps, seeds, "s").double().mean(1)
    hidden = 1 - (1 - bands) * (1 - spans)  # a cell is visible where neither hides it
    assert hidden.mean().item() == pytest.approx(fraction, abs=0.01)


def test_masks_partition_the_valid_cells_and_zero_widths_change_nothing():
    x, lengths = batch(100, 40, 16)
    x = x + 10 * (torch.arange(40) < lengths[:, None])[:, :, None]
    seeds = torch.arange(100)
    out, hidden = SpecMasks(2, 5, 2, 8)(x, lengths, seeds, "s")
    valid = (torch.arange(40) < lengths[:, None])[:, :, None].expand_as(x)
    assert torch.equal(out == 0, hidden | ~valid)
    assert torch.equal(out[valid & ~hidden], x[valid & ~hidden])
    assert 0 < hidden[valid].double().mean() < 0.7
    for nothing in (SpecMasks(2, 0, 2, 0), SpecMasks(0, 27, 0, 100)):
        out, hidden = nothing(x, lengths, seeds, "s")
        assert torch.equal(out, x)
        assert not hidden.any()
        out, loss = FrameAlteration(masks=nothing)(x, lengths, seeds)
        assert torch.equal(out, x)
        assert torch.equal(loss, valid)


def test_span_widths_are_capped_by_the_true_length():
    policy = SpecMasks(0, 0, 1, 70, 0.2)
    for length, widest in ((100, 20), (37, 7), (1000, 70), (4, 0)):
        spans = policy.frames(torch.full((3000,), length), 1200, torch.arange(3000), "s")
        assert not spans[:, length:].any()
        assert spans.sum(1).max() == widest
        assert spans.sum(1).double().mean().item() == pytest.approx(widest / 2, abs=0.04 * widest)


def test_single_masks_are_torchaudios():
    """torchaudio draws widths in [0, param): param = width + 1 is the inclusive range."""
    torch.manual_seed(0)
    seeds = torch.arange(6000)
    ones = torch.ones(6000, 1, 40, 1)
    theirs = FrequencyMasking(13, iid_masks=True)(ones)[:, 0, :, 0] == 0
    ours = SpecMasks(1, 12, 0, 0).features(40, seeds, "s")
    check_alike(ours, theirs)
    theirs = TimeMasking(13, iid_masks=True)(ones.transpose(2, 3))[:, 0, 0] == 0
    ours = SpecMasks(0, 0, 1, 12).frames(torch.full((6000,), 40), 40, seeds, "s")
    check_alike(ours, theirs)


def check_alike(ours, theirs):
    """Widths and inner places alike to five standard errors.

    torchaudio subtracts the width before it is made whole, so that its masks shy away from the end
    and never reach the last place.
    """
    widths = [m.sum(1).bincount(minlength=13).double() / len(m) for m in (ours, theirs)]
    assert len(widths[0]) == len(widths[1]) == 13
    assert (widths[0] - widths[1]).abs().max() < 0.025
    assert (ours.double().mean(0) - theirs.double().mean(0)).abs()[:32].max() < 0.025
    assert ours[:, -1].any()
    assert not theirs[:, -1].any()
