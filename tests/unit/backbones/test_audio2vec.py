"""Audio2Vec's encoder: one vector per slice, which no other slice and no padding changes."""

from itertools import pairwise

import pytest
import torch
from conv_laws import dummies_change_nothing, padding_changes_nothing

from mmssl.backbones.audio2vec import Audio2Vec
from mmssl.types import UserError


def small(**options):
    torch.manual_seed(0)
    return Audio2Vec(
        1, **{"bands": 8, "frames": 6, "shift": 6, "channels": (4, 6), "width": 5, **options}
    )


def test_the_published_size():
    widths = [1, 64, 128, 256, 256, 512]
    blocks = sum(3 * a * b + 3 * b * b + 4 * b for a, b in pairwise(widths))
    net = Audio2Vec()
    assert sum(p.numel() for p in net.parameters()) == blocks + 512 * 128 + 128
    assert net.grid((96, 64)) == (1, 1)
    assert net.grid((488, 64)) == (5, 1)


def test_a_token_reads_its_own_slice():
    net, x = small(shift=3).eval(), torch.randn(2, 1, 20, 8, requires_grad=True)
    tokens, grid = net(x)
    assert grid == (5, 1)
    for i in range(5):
        (grad,) = torch.autograd.grad(tokens[0, i].sum(), x, retain_graph=True)
        seen = grad.abs().sum((1, 3)).nonzero()
        assert set(seen[:, 0].tolist()) == {0}
        assert 3 * i <= int(seen[:, 1].min())
        assert int(seen[:, 1].max()) < 3 * i + 6
    alone, _ = net(x[:, :, 6:12])
    torch.testing.assert_close(tokens[:, 2:3], alone)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    items = [torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (24, 13, 6)]
    padding_changes_nothing(small().double().train(training), items, training)


def test_dummies_change_nothing():
    dummies_change_nothing(small, torch.randn(3, 1, 12, 8))


def test_what_is_refused():
    with pytest.raises(UserError, match="6 frames and 8 bands cannot be halved 3 times"):
        small(channels=(4, 4, 4))
    with pytest.raises(UserError, match=r"8 bands and at least 6 frames, got \(5, 8\)"):
        small().grid((5, 8))
    with pytest.raises(UserError, match=r"got \(6, 9\)"):
        small().grid((6, 9))
