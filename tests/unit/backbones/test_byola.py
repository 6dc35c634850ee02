"""BYOL-A's encoders: published sizes, the release's arithmetic, laws of padding."""

import pytest
import torch
from conv_laws import dummies_change_nothing
from small_methods import make_tokens
from torch import nn

from mmssl.backbones.byola import BYOLA
from mmssl.heads.embed import pool
from mmssl.types import UserError


@pytest.mark.parametrize(
    ("hidden", "count"), [(512, 600_192), (1024, 1_649_792), (2048, 5_321_856)]
)
def test_version_1_has_the_published_number_of_parameters(hidden, count):
    assert sum(p.numel() for p in BYOLA(hidden=hidden).parameters()) == count


def test_published_grids_and_widths():
    assert (BYOLA().grid((96, 64)), BYOLA().width) == ((12, 1), 2048)  # 12 steps of 80 ms
    second = BYOLA(version=2)
    assert (second.grid((96, 64)), second.width) == ((24, 1), 3072)  # 24 of 40 ms, 1024 + 2048
    assert BYOLA().fields()[0].stride == 8


@pytest.mark.parametrize("version", [1, 2])
def test_the_arithmetic_is_that_of_the_paper(version):
    torch.manual_seed(0)
    net = BYOLA(version=version, hidden=32).eval()
    x = torch.randn(2, 1, 96, 64)
    maps = x.transpose(2, 3)  # the paper's (bands, frames)
    for conv, norm in zip(net.features[::4], net.features[1::4], strict=True):
        own = nn.BatchNorm2d(64).eval()
        own.weight.data.copy_(norm.weight)
        weight = conv.weight.transpose(2, 3)
        maps = own(nn.functional.conv2d(maps, weight, conv.bias, padding=1))
        maps = nn.functional.max_pool2d(maps.relu(), 2)
    steps = maps.permute(0, 3, 2, 1).flatten(2)  # (items, frames, bands x channels)
    want = net.linear(steps)
    want = torch.cat([steps, want], -1) if version == 2 else want
    tokens, grid = net(x)
    torch.testing.assert_close(tokens, want, atol=1e-5, rtol=1e-4)
    assert grid == net.grid((96, 64))


def test_the_released_network_gives_the_same_with_the_same_weights():
    """s3prl's copy of it; its maps are (bands, frames)."""
    released = pytest.importorskip(
        "s3prl.upstream.byol_a.byol_a", reason="pip install --no-deps -r tests/peers.txt"
    )
    torch.manual_seed(0)
    theirs, net = released.AudioNTT2020(d=32).eval(), BYOLA(hidden=32).eval()
    for norm in theirs.features[1::4]:
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    own, given = net.state_dict(), theirs.state_dict().values()
    turned = [v.transpose(2, 3) if v.dim() == 4 else v for v in given]
    pairs = zip(own.items(), turned, strict=True)
    net.load_state_dict({name: value.reshape(mine.shape) for (name, mine), value in pairs})
    x = torch.randn(2, 1, 96, 64)
    tokens, grid = net(x)
    want = theirs(x.transpose(2, 3))
    pad = torch.zeros(2, grid[0], dtype=torch.bool)
    found = pool(make_tokens(tokens, grid, pad), "mean_max")
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_downstream_reads_the_sum_of_maximum_and_mean():
    x = torch.randn(2, 5, 3)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    found = pool(make_tokens(x, (5,), pad), "mean_max")
    torch.testing.assert_close(found[0], x[0].amax(0) + x[0].mean(0))
    torch.testing.assert_close(found[1], x[1, :3].amax(0) + x[1, :3].mean(0))


def test_dummy_items_change_nothing():
    torch.manual_seed(0)
    dummies_change_nothing(lambda: BYOLA(hidden=16, dropout=0.0), torch.randn(3, 1, 24, 64))


def test_another_number_of_bands_is_refused():
    with pytest.raises(UserError, match="byol_a reads a spectrogram of 64 bands"):
        BYOLA().grid((96, 40))
    with pytest.raises(UserError, match="too small"):
        BYOLA().grid((7, 64))
