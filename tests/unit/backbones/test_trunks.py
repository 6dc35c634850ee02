"""Networks of torchvision and of speech: grids, peers, padding."""

import pytest
import torch
import torchvision

from mmssl.backbones.convnets import MapBatchNorm
from mmssl.backbones.trunks import VGG16, ResNet18, ResNet50, SpeechConv
from mmssl.specs import SpeechConvSpec
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_published_grids():
    assert ResNet18(3).grid((1, 224, 224)) == (1, 7, 7)
    assert ResNet18(3, 16).grid((1, 224, 224)) == (1, 14, 14)
    assert VGG16(3).grid((1, 224, 224)) == (1, 14, 14)
    assert ResNet18(3).width == VGG16(3).width == 512
    assert (ResNet50(3).grid((1, 224, 224)), ResNet50(3).width) == ((1, 7, 7), 2048)
    assert VGG16(3, outputs=1024).width == 1024
    # matchmaps: 16 frames of 10 ms per step, each of which sees 265
    matchmaps = SpeechConv()
    time = matchmaps.fields()[0]
    assert (time.stride, time.size) == (16, 265)
    assert matchmaps.grid((2048, 40)) == (128, 1)
    davenet = SpeechConv(channels=(64, 512, 1024), kernels=(5, 25, 25), pools=(4, 4, 4), norm=False)
    assert davenet.grid((1024, 40)) == (128, 1)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_resnet_equals_torchvision(stride):
    net = ResNet18(3, stride).eval()
    reference = torchvision.models.resnet18(weights=None)
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    state = {}
    for key, value in net.features.state_dict().items():
        place, _, rest = key.partition(".")
        scalar = key.endswith("num_batches_tracked")
        state[f"{names[int(place)]}.{rest}"] = value.reshape(()) if scalar else value
    assert reference.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    x = torch.randn(2, 3, 64, 96)
    tokens, grid = net(x)
    assert grid == net.grid(x.shape[2:]) == (64 // stride, 96 // stride)
    if stride == 32:
        reference.eval()
        want = torch.nn.Sequential(*[getattr(reference, name) for name in names])(x)
        torch.testing.assert_close(tokens, want.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)
    assert all(isinstance(m, MapBatchNorm) for m in net.modules() if "BatchNorm" in str(type(m)))


def test_resnet_50_equals_torchvision_and_may_start_its_branches_at_zero():
    net = ResNet50(3).double().eval()
    reference = torchvision.models.resnet50(weights=None).double().eval()
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    parts = torch.nn.Sequential(*(getattr(reference, name) for name in names))
    state = net.features.state_dict()
    parts.load_state_dict({k: v.reshape(parts.state_dict()[k].shape) for k, v in state.items()})
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    tokens, grid = net(x)
    assert grid == (2, 3)
    torch.testing.assert_close(tokens, parts(x).flatten(2).transpose(1, 2), atol=1e-9, rtol=1e-9)
    zero = ResNet50(3, zero_init=True).features
    assert not any(block.bn3.weight.any() for layer in zero[4:] for block in layer)


def test_vgg_equals_torchvision():
    net = VGG16(3)
    reference = torchvision.models.vgg16(weights=None).features
    reference.load_state_dict(net.features.state_dict())
    x = torch.randn(1, 3, 48, 64)
    tokens, grid = net(x)
    assert grid == (3, 4)
    want = reference[:-1](x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("make", [ResNet18, VGG16])
def test_any_number_of_channels(make, channels):
    tokens, grid = make(channels).eval()(torch.randn(2, channels, 65, 70))
    assert tokens.shape == (2, grid[0] * grid[1], 512)


@pytest.mark.parametrize("pool", [3, 4])
@pytest.mark.parametrize("train", [False, True])
def test_padding_changes_no_step_of_speech(pool, train):
    """Appended noise behind an item's length, also in batch statistics and gradients."""
    net = SpeechConv(1, 6, (8, 8, 8), (1, 5, 7), (0, pool, pool)).double().train(train)
    x = torch.randn(3, 1, 37, 6, dtype=torch.float64)
    longer = torch.cat([x, 9 * torch.randn(3, 1, 21, 6, dtype=torch.float64)], 2)
    lengths = torch.tensor([37, 20, 1])
    outs, grads = [], []
    for signal in (x, longer):
        net.zero_grad()
        tokens, grid = net(signal, lengths)
        assert grid == (net.grid(signal.shape[2:]))
        kept = torch.arange(grid[0]) < net.out_lengths(lengths)[:, None]
        outs.append(tokens[kept])
        outs[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert net.out_lengths(lengths).tolist() == [10 if pool == 3 else 9, 5, 1]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_dummy_items_enter_no_statistics_of_speech():
    net = SpeechConv(1, 6, (8,), (1,), (0,)).train()
    x = torch.randn(3, 1, 9, 6)
    net(x, valid_P=torch.tensor([True, True, False]))
    torch.testing.assert_close(net.norm.running_mean[0], 0.1 * x[:2].mean())


def test_wrong_speech_inputs_are_refused():
    with pytest.raises(UserError, match=r"spectrogram of 40 bands, got \(100, 64\)"):
        SpeechConv()(torch.zeros(1, 1, 100, 64))
    for keys, said in (
        ({"kernels": [1, 4], "channels": [8, 8], "pools": [0, 3]}, "must be odd"),
        ({"kernels": [1], "channels": [8, 8], "pools": [0, 3]}, "one entry per layer"),
    ):
        with pytest.raises(ValueError, match=said):
            SpeechConvSpec(kind="speech_conv", **keys)
