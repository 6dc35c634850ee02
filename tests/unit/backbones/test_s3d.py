"""S3D-G against torchvision's S3D; sizes of MIL-NCE and MMV; padding."""

from itertools import pairwise

import pytest
import torch
from conv_laws import dummies_change_nothing, padding_changes_nothing
from torchvision.models.video import S3D

from mmssl.backbones.convnets import MapBatchNorm
from mmssl.backbones.s3d import BLOCKS, S3DG, SelfGate
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("training", [False, True])
def test_without_gates_it_is_torchvisions_network_behind_the_first_layer(training):
    ours = S3DG(gating=False).double().train(training)
    theirs = S3D(norm_layer=torch.nn.BatchNorm3d).double().train(training)
    state = {
        name: value.reshape(()) if name.endswith("num_batches_tracked") else value
        for name, value in ours.features.state_dict().items()
        if not name.startswith("0.")
    }
    own = {name for name in theirs.features.state_dict() if not name.startswith("0.")}
    assert set(state) == own
    theirs.features.load_state_dict(state, strict=False)
    ours.features[0] = theirs.features[0]
    x = torch.rand(2, 3, 16, 64, 64, dtype=torch.float64)
    tokens, grid = ours(x)
    assert grid == (2, 2, 2)
    expected = theirs.features(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-9, rtol=1e-7)


# ---------------------------------------------------------------- sizes


def gates() -> int:
    widths = [192, *(n for b in BLOCKS for n in (b[0], b[2], b[4], b[5]))]
    return sum(n * n + n for n in widths)


@pytest.mark.parametrize(("frames", "total"), [(7, 9_162_704), (3, 9_125_072)])
def test_parameters_are_torchvisions_a_full_first_layer_and_gates(frames, total):
    theirs = sum(p.numel() for p in S3D().features.parameters())
    separable = 64 * 3 * 49 + 64 * 64 * 7 + 4 * 64
    full = 64 * 3 * 49 * frames + 2 * 64
    assert sum(p.numel() for p in S3DG(first_frames=frames).parameters()) == total
    assert total == theirs - separable + full + gates()


def test_channels_scale_all_widths():
    outs = [b[0] + b[2] + b[4] + b[5] for b in BLOCKS]
    assert outs == [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    narrow = S3DG(channels=16)
    assert narrow.width == 256
    convs = [m for m in narrow.features.modules() if isinstance(m, torch.nn.Conv3d)]
    full = [m for m in S3DG().features.modules() if isinstance(m, torch.nn.Conv3d)]
    assert [4 * c.out_channels for c in convs] == [c.out_channels for c in full]
    with pytest.raises(UserError, match=r"s3dg\.channels: 12 is no multiple of 8"):
        S3DG(channels=12)


def test_published_grids():
    net = S3DG(channels=8)
    assert net.grid((16, 224, 224)) == (2, 7, 7)  # the release's own test
    assert net.grid((32, 200, 200)) == (4, 7, 7)  # MMV: 200, 100, 50, 25, 13, 7
    assert net.strides == (32, 32)
    # kernels 7, 3, then at strides 2, 4 and 8: 1 + 6 + 2*2 + 2*(2+2+2) + 4*(2*5+1) + 8*(2+2)
    assert net.time_field() == (8, 99, 2.0)


@pytest.mark.parametrize("shape", [(16, 64, 64), (11, 50, 37), (1, 20, 90), (2, 8, 8)])
def test_grid_equals_the_real_map(shape):
    net = S3DG(channels=8).eval()
    tokens, grid = net(torch.rand(2, 3, *shape))
    assert grid == net.grid(shape)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], 128)
    maps = net.features(torch.rand(1, 3, *shape))
    assert tuple(maps.shape[1:]) == (128, *grid)


# ---------------------------------------------------------------- gates


def test_a_gate_is_a_sigmoid_of_the_mean_over_the_clip():
    gate = SelfGate(4)
    x = torch.randn(2, 4, 3, 5, 6)
    expected = torch.empty_like(x)
    for p in range(2):
        mean = torch.stack([x[p, c].sum() / 90 for c in range(4)])
        raw = gate.linear.weight @ mean + gate.linear.bias
        for c in range(4):
            expected[p, c] = x[p, c] / (1 + torch.exp(-raw[c]))
    torch.testing.assert_close(gate(x), expected)


def test_gates_stand_behind_the_second_layer_and_every_branch():
    names = [n for n, m in S3DG(channels=8).features.named_modules() if isinstance(m, SelfGate)]
    blocks = (5, 6, 8, 9, 10, 11, 12, 14, 15)
    assert names == ["3.1", *(f"{i}.branch{k}.1" for i in blocks for k in range(4))]


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lengths", [[20, 11, 4], [20, 13, 1]])
def test_padding_changes_nothing(training, lengths):
    net = S3DG(channels=8).double().train(training)
    clips = [torch.rand(1, 3, n, 33, 40, dtype=torch.float64) for n in lengths]
    padding_changes_nothing(net, clips, training)


def test_dummies_change_nothing():
    dummies_change_nothing(lambda: S3DG(channels=8), torch.rand(4, 3, 6, 32, 32))


def test_norms_are_ours():
    """torchvision's own (eps 1e-3, momentum 1e-3) are not MMV's (1e-5, 0.1)."""
    norms = [m for m in S3DG(channels=8).modules() if isinstance(m, MapBatchNorm)]
    assert len(norms) == 1 + 1 + 2 + 9 * (1 + 3 + 3 + 1)
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    assert all(a is not b for a, b in pairwise(norms))
