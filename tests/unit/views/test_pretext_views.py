"""Turns are undone by turns; tiles come from their own stretch of valid frames."""

import torch

from mmssl.views.pretext import mirrored, permutations, tile_sizes, tiles, turned


def test_turns_go_counter_clockwise_and_four_are_none():
    x = torch.arange(2 * 3 * 2 * 4 * 4).reshape(2, 3, 2, 4, 4)
    assert torch.equal(turned(x, 1)[..., 0, :], x[..., :, -1])  # the right edge becomes the top
    for k in range(4):
        assert torch.equal(turned(turned(x, k), (4 - k) % 4), x)


def test_spectrograms_are_mirrored_within_their_valid_frames():
    x = torch.arange(2 * 6 * 3).float().reshape(2, 1, 6, 3)
    lengths = torch.tensor([6, 4])
    back = mirrored(x, 1, lengths)
    assert torch.equal(back[0], x[0].flip(1))
    assert torch.equal(back[1, :, :4], x[1, :, :4].flip(1))
    assert torch.equal(back[1, :, 4:], x[1, :, 4:])
    assert torch.equal(mirrored(x, 2, lengths), x.flip(3))
    for which in range(4):
        assert torch.equal(mirrored(mirrored(x, which, lengths), which, lengths), x)


def test_tiles_lie_in_their_own_stretch_and_do_not_overlap():
    frames, bands, count = 100, 8, 5
    assert tile_sizes((frames, bands), [count], 0.8) == (16, 8)
    # Values grow with time, so that a tile, although normalised, can be found again by its shape.
    x = torch.rand(300, 1, frames, bands, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((300,), frames)
    lengths[150:] = 90
    seeds = torch.arange(300)
    found = tiles(x, lengths, [count], (16, 8), seeds, "place")
    assert found.shape == (300, count, 1, 16, 8)
    firsts = torch.empty(300, count)
    windows = x[:, 0].unfold(1, 16, 1).transpose(2, 3).flatten(2)  # (P, start, cells)
    windows = windows - windows.mean(-1, keepdim=True)
    windows = windows / windows.norm(dim=-1, keepdim=True)
    flat = found.flatten(2) / found.flatten(2).norm(dim=-1, keepdim=True)
    likeness = torch.einsum("psc,pnc->pns", windows, flat)
    assert float(likeness.max(-1).values.min()) > 0.9999
    firsts = likeness.argmax(-1)
    spans = lengths[:, None] / count
    numbers = torch.arange(count)
    assert bool((firsts >= (spans * numbers).floor()).all())
    assert bool((firsts + 16 <= (spans * (numbers + 1)).ceil()).all())
    assert bool((firsts.diff(dim=1) >= 16).all())
    assert len(set(firsts[:150, 0].tolist())) >= 4  # at random places


def test_tiles_have_no_level_and_cut_every_axis():
    x = 3 + 5 * torch.rand(2, 3, 6, 12, 12)
    sizes = tile_sizes((6, 12, 12), [1, 3, 3], 0.75)
    assert sizes == (6, 3, 3)
    found = tiles(x, torch.tensor([6, 6]), [1, 3, 3], sizes, torch.tensor([1, 2]), "place")
    assert found.shape == (2, 9, 3, 6, 3, 3)
    torch.testing.assert_close(found.flatten(2).mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.flatten(2).std(-1, correction=0), torch.ones(2, 9), atol=1e-3, rtol=0
    )
    constant = tiles(
        torch.ones_like(x), torch.tensor([6, 6]), [1, 3, 3], sizes, torch.arange(2), "p"
    )
    assert not constant.any()


def test_permutations_are_uniform():
    found = permutations(torch.arange(6000), 3, "order")
    assert torch.equal(found.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = (found * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert int(counts.min()) > 900
    assert int(counts.max()) < 1100
