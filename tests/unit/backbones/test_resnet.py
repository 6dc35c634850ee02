"""ResNet50-v2 against torchvision's ResNet-50, temporal shifts, padding."""

import pytest
import torch
import torchvision
from conv_laws import dummies_change_nothing, padding_changes_nothing
from torch import nn
from torch.nn import functional as F

from mmssl.backbones.convnets import MapBatchNorm
from mmssl.backbones.resnet import PreBottleneck, ResNetV2, TemporalShift

SMALL = {"channels": 8, "blocks": (1, 2, 1, 1)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- torchvision


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_convolutions_are_torchvisions():
    """The same convolutions; only order and number of norms differ."""
    ours, theirs = ResNetV2(3), torchvision.models.resnet50(weights=None)
    assert sum(c.weight.numel() for c in convolutions(ours)) == sum(
        c.weight.numel() for c in convolutions(theirs)
    )
    # v2: a norm of the input, none behind the last convolution of a block, one at the very end
    inner, inputs = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3, [64, *[256] * 3, *[512] * 4]
    inputs += [*[1024] * 6, 2048, 2048]
    norms = 2 * (sum(inputs) + 2 * sum(inner) + 2048)
    total = sum(p.numel() for p in ours.parameters())
    assert total == sum(c.weight.numel() for c in convolutions(ours)) + norms
    assert total == 23_500_352
    assert ours.width == 2048


def test_where_no_relu_bites_it_is_torchvisions_network():
    """With weights that are not negative and norms that do nothing, v1 and v2 are one network."""
    ours, theirs = ResNetV2(3).eval(), torchvision.models.resnet50(weights=None).eval()
    order = []  # torchvision's block: three convolutions, then that of the skip
    for block in (m for m in ours.features if isinstance(m, PreBottleneck)):
        order += [*block.convs, *([] if block.project is None else [block.project])]
    mine = [ours.features[0], *order]
    for own, other in zip(mine, convolutions(theirs), strict=True):
        own.weight.data.abs_().mul_(0.1)
        other.load_state_dict(own.state_dict())
    for norm in (m for net in (ours, theirs) for m in net.modules()):
        if isinstance(norm, MapBatchNorm | nn.BatchNorm2d):
            norm.running_var.fill_(1 - norm.eps)
    x = torch.rand(2, 3, 75, 64)
    tokens, grid = ours(x)
    assert grid == ours.grid((75, 64)) == (3, 2)
    theirs.avgpool = theirs.fc = nn.Identity()
    expected = theirs(x).reshape(2, 2048, 6).transpose(1, 2)
    assert float(expected.min()) > 0
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=0)


def test_published_sizes():
    assert ResNetV2(1, **SMALL).grid((150, 80)) == (5, 3)  # MMV: 3.2 s of sound
    assert sum(p.numel() for p in ResNetV2(1).parameters()) == 23_494_080
    with torch.device("meta"):
        wide = ResNetV2(3, channels=128, shift=0.125)
    assert wide.width == 4096
    assert sum(p.numel() for p in wide.parameters()) == 93_891_712


def test_a_block_is_the_published_formula():
    block = PreBottleneck(6, 4, stride=2, project=True).eval()
    with torch.no_grad():
        for norm in block.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()

    def act(norm, x):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return ((x - norm.running_mean[:, None, None]) * scale[:, None, None]
                + norm.bias[:, None, None]).clamp(min=0)  # fmt: skip

    x = torch.randn(2, 6, 9, 7)
    first = act(block.norms[0], x)
    y = act(block.norms[1], F.conv2d(first, block.convs[0].weight))
    y = act(block.norms[2], F.conv2d(y, block.convs[1].weight, stride=2, padding=1))
    expected = F.conv2d(y, block.convs[2].weight) + F.conv2d(first, block.project.weight, stride=2)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    plain = PreBottleneck(16, 4).eval()
    for conv in plain.convs:
        nn.init.zeros_(conv.weight)
    x = torch.randn(1, 16, 3, 3)
    assert torch.equal(plain(x), x)  # nothing stands between a block's input and its output


# ---------------------------------------------------------------- shifts


def test_shift_moves_an_eighth_each_way_and_fills_with_zeros():
    shift = TemporalShift(0.125)
    shift.frames = 5
    x = torch.randn(2 * 5, 17, 2, 3)  # two channels move each way
    got = shift(x).unflatten(0, (2, 5))
    clip = x.unflatten(0, (2, 5))
    for t in range(5):
        before = clip[:, t - 1, :2] if t > 0 else torch.zeros(2, 2, 2, 3)
        behind = clip[:, t + 1, -2:] if t < 4 else torch.zeros(2, 2, 2, 3)
        assert torch.equal(got[:, t, :2], before)
        assert torch.equal(got[:, t, 2:-2], clip[:, t, 2:-2])
        assert torch.equal(got[:, t, -2:], behind)


def test_the_releases_order_of_channels_permutes_the_next_weights():
    """MMV's release puts the channels from behind in front: [last eighth, middle, first eighth]."""
    shift, conv = TemporalShift(0.125), nn.Conv2d(16, 3, 1)
    shift.frames = 4
    x = torch.randn(4, 16, 2, 2)
    moved = shift(x)
    released = torch.cat([moved[:, -2:], moved[:, 2:-2], moved[:, :2]], 1)
    order = [*range(14, 16), *range(2, 14), *range(2)]
    expected = F.conv2d(released, conv.weight[:, order], conv.bias)
    torch.testing.assert_close(conv(moved), expected)


@pytest.mark.parametrize(("shift", "reach"), [(0.125, 5), (0.0, 0)])
def test_a_frame_sees_as_many_neighbours_as_there_are_blocks(shift, reach):
    net = ResNetV2(3, **SMALL, shift=shift).eval()
    assert net.time_field() == (1, 1, 0.0)
    x = torch.rand(1, 3, 15, 32, 32, requires_grad=True)
    tokens, grid = net(x)
    assert grid == (15, 1, 1)
    tokens[0, 7].sum().backward()
    seen = x.grad.abs().sum((0, 1, 3, 4)) > 0
    assert seen.nonzero()[:, 0].tolist() == list(range(7 - reach, 8 + reach))


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lengths", [[70, 41, 33], [64, 1, 30]])
def test_padded_sounds_change_nothing(training, lengths):
    net = ResNetV2(1, **SMALL).double().train(training)
    items = [torch.randn(1, 1, n, 40, dtype=torch.float64) for n in lengths]
    padding_changes_nothing(net, items, training)


@pytest.mark.parametrize("training", [False, True])
def test_padded_videos_change_nothing(training):
    net = ResNetV2(3, **SMALL, shift=0.125).double().train(training)
    clips = [torch.rand(1, 3, n, 32, 40, dtype=torch.float64) for n in (7, 4, 1)]
    padding_changes_nothing(net, clips, training)


@pytest.mark.parametrize("shape", [(4, 1, 40, 40), (3, 3, 4, 32, 32)])
def test_dummies_change_nothing(shape):
    dummies_change_nothing(lambda: ResNetV2(shape[1], **SMALL, shift=0.125), torch.rand(shape))
