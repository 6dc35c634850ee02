"""Sampling from a generator."""

import torch

from mmssl.rng import row_uniform
from mmssl.targets.replaced import sample


def test_samples_follow_the_softmax():
    p = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.25])
    u = row_uniform(torch.tensor([3]), 40000, "u")[0]
    drawn = sample(p.log().expand(40000, -1), u)
    found = torch.bincount(drawn, minlength=5) / 40000
    torch.testing.assert_close(found, p, atol=0.008, rtol=0)
    assert int(found[1]) == 0


def test_the_ends_of_the_unit_interval_draw_possible_classes():
    u = torch.tensor([0.0, 1 - 2**-24])
    assert sample(torch.tensor([[-1e9, 0.0, -1e9]]).expand(2, -1), u).tolist() == [1, 1]
    wide = torch.zeros(2, 30522)
    assert sample(wide, u).tolist()[0] == 0
    assert sample(wide, u).max() < 30522
    assert sample(torch.zeros(0, 7), u[:0]).shape == (0,)
