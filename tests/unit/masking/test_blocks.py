"""BEiT's rectangles against a plain loop over one image."""

import math

import numpy as np
import pytest
import torch

from mmssl.masking import beit_block_mask, block_mask


def by_hand(random, high, wide, count, smallest, aspect):
    """The rule of the paper's code, one image, one rectangle at a time."""
    mask = np.zeros((high, wide), dtype=bool)
    missing, refused = count, 0
    while missing and refused < 10:
        area = (
            random.uniform(smallest, missing)
            if missing > smallest
            else random.uniform(missing, smallest)
        )
        shape = math.exp(random.uniform(math.log(aspect), -math.log(aspect)))
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        refused += 1
        if h >= high or w >= wide:
            continue
        top, left = random.integers(0, high - h + 1), random.integers(0, wide - w + 1)
        gain = int((~mask[top : top + h, left : left + w]).sum())
        if 0 < gain <= missing:
            mask[top : top + h, left : left + w] = True
            missing, refused = missing - gain, 0
    free = np.flatnonzero(~mask)
    mask.flat[random.permutation(free)[:missing]] = True
    return mask


def summary(mask_PHW):
    """Agreement with the lower and right neighbour, share of lone cells, hidden share of a cell."""
    same = (
        (mask_PHW[:, 1:] == mask_PHW[:, :-1]).mean(),
        (mask_PHW[:, :, 1:] == mask_PHW[:, :, :-1]).mean(),
    )
    around = np.pad(mask_PHW, ((0, 0), (1, 1), (1, 1)))
    near = around[:, 2:, 1:-1] | around[:, :-2, 1:-1] | around[:, 1:-1, 2:] | around[:, 1:-1, :-2]
    return np.array([*same, (mask_PHW & ~near).mean()]), mask_PHW.mean(0)


@pytest.mark.parametrize(("high", "wide"), [(14, 14), (16, 8)])
def test_rectangles_are_those_of_the_published_rule(high, wide):
    count = round(120 / 196 * high * wide)
    hidden = beit_block_mask(torch.arange(3000), (high, wide), 120 / 196)
    assert (hidden.sum(1) == count).all()
    if (high, wide) == (14, 14):
        assert count == 120  # data2vec vision
    random = np.random.default_rng(0)
    expected = np.stack([by_hand(random, high, wide, count, 16, 0.3) for _ in range(3000)])
    ours, ours_cells = summary(hidden.reshape(-1, high, wide).numpy())
    theirs, their_cells = summary(expected)
    assert np.abs(ours - theirs).max() < 0.006
    assert np.abs(ours_cells - their_cells).max() < 0.05
    assert ours[0] > 0.75  # 0.525 for random cells


def test_one_rectangle_has_the_smallest_area_and_the_aspect():
    """With as many cells to hide as the smallest area, the first rectangle is the mask."""
    hidden = beit_block_mask(torch.arange(3000), (20, 20), 36 / 400, smallest=36).reshape(
        -1, 20, 20
    )
    assert (hidden.flatten(1).sum(1) == 36).all()
    high, wide = hidden.any(2).sum(1), hidden.any(1).sum(1)
    solid = high * wide == 36
    assert solid.double().mean() > 0.2
    assert {4, 6, 9} <= set(high[solid].tolist())  # 4 x 9, 6 x 6, 9 x 4
    shapes = high[solid] / wide[solid]
    assert shapes.min() >= 0.25
    assert shapes.max() <= 4
    tall = (high > wide)[solid].double().mean() - (high < wide)[solid].double().mean()
    assert tall.abs() < 0.06


def test_rectangles_stay_in_the_valid_part():
    """A row of a padded batch draws as if the padding were not there, along both axes."""
    valid = torch.zeros(300, 12, 10, dtype=torch.bool)
    valid[:, :9, :10] = True
    wide = beit_block_mask(torch.arange(300), (12, 10), 0.6, valid_PN=valid.flatten(1))
    assert torch.equal(
        wide.reshape(-1, 12, 10)[:, :9].flatten(1), beit_block_mask(torch.arange(300), (9, 10), 0.6)
    )
    nothing = beit_block_mask(torch.arange(4), (5, 5), 0.6, valid_PN=torch.zeros(4, 25).bool())
    assert not nothing.any()
    assert beit_block_mask(torch.arange(4), (5, 5), 1.0).all()


def test_a_still_picture_is_a_plane():
    seeds = torch.arange(4)
    for rule in (block_mask, beit_block_mask):
        assert torch.equal(rule(seeds, (1, 14, 14), 0.6), rule(seeds, (14, 14), 0.6))
