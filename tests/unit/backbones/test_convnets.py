"""Published convolutional encoders: grids, sizes, batch statistics."""

from itertools import pairwise

import pytest
import torch
import torchvision

from mmssl.backbones.convnets import ConvAV8, EfficientNetB0, MapBatchNorm
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_ave_net_grids():
    assert ConvAV8(3, 2).grid((1, 224, 224)) == (1, 14, 14)
    assert ConvAV8(1, 2).grid((257, 200)) == (16, 12)
    assert ConvAV8(1, 2).grid((197, 257)) == (12, 16)  # our (T, F) order, third-party framing
    assert ConvAV8(3, 1).grid((1, 224, 224)) == (1, 28, 28)
    assert ConvAV8(1, 1).grid((257, 197)) == (32, 24)
    assert ConvAV8(1, 2).strides == (16, 16)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_av8_has_4_7_million_parameters(stride, channels):
    total = sum(p.numel() for p in ConvAV8(channels, stride).parameters())
    widths = [channels, 64, 64, 128, 128, 256, 256, 512, 512]
    assert total == sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    assert abs(total / 4.7e6 - 1) < 0.01


@pytest.mark.parametrize("net", [ConvAV8(1, 2), ConvAV8(1, 1, input_norm=True), EfficientNetB0(1)])
@pytest.mark.parametrize("shape", [(96, 64), (65, 70)])
def test_grid_and_width_equal_the_real_map(net, shape):
    tokens, grid = net.eval()(torch.randn(2, 1, *shape))
    assert grid == net.grid(shape)
    assert tokens.shape == (2, grid[0] * grid[1], net.width)
    maps = net.features(torch.zeros(1, 1, *shape))
    assert tuple(maps.shape[1:]) == (net.width, *grid)


def test_tokens_are_row_major_and_frames_are_folded():
    net = ConvAV8(3, 2).eval()
    x = torch.randn(2, 3, 2, 32, 48)
    tokens, grid = net(x)
    assert grid == (2, 2, 3)
    frame, _ = net(x[1:2, :, 1:2])
    torch.testing.assert_close(tokens[1:2, 6:], frame, atol=1e-5, rtol=1e-4)
    maps = net.features(x[1:2, :, 1])
    torch.testing.assert_close(tokens[1, 6 + 4], maps[0, :, 1, 1], atol=1e-5, rtol=1e-4)


def test_fields_centre_the_map_on_the_image():
    field = ConvAV8(3, 1).fields()[0]
    assert (field.stride, field.first) == (8, 3.5)
    assert EfficientNetB0(1).strides == (32, 32)


def test_efficient_net_equals_torchvision():
    net = EfficientNetB0(1)
    reference = torchvision.models.efficientnet_b0(weights=None)
    first = reference.features[0][0]
    reference.features[0][0] = torch.nn.Conv2d(1, first.out_channels, 3, 2, 1, bias=False)
    state = net.features.state_dict()
    reference.features.load_state_dict(
        {k: v.reshape(()) if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    )
    x = torch.randn(2, 1, 96, 64)
    tokens, grid = net.eval()(x)
    assert grid == (3, 2)
    expected = reference.features.eval()(x).flatten(2).transpose(1, 2)
    assert tokens.shape == (2, 6, 1280)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
    assert all(b.ndim > 0 for b in net.buffers())


def test_map_batch_norm_equals_torch_and_the_masked_one():
    ours, masked, reference = MapBatchNorm(4), MapBatchNorm(4), torch.nn.BatchNorm2d(4)
    for _ in range(2):
        x = torch.randn(3, 4, 5, 6)
        expected = reference(x)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
        every = torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(masked(x, every), expected, atol=1e-5, rtol=1e-5)
    for own in (ours, masked):
        torch.testing.assert_close(own.running_var, reference.running_var, atol=1e-5, rtol=1e-5)
        assert own.num_batches_tracked.tolist() == [2]
    assert isinstance(ours, MaskedSyncBatchNorm)


@pytest.mark.parametrize("axes", [(5, 6), (4, 3, 2)])
def test_masked_norms_gradients_are_those_of_torchs_on_the_valid_places(axes):
    norm, reference = MapBatchNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    x = torch.randn(3, 4, *axes, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(axes[0]) < torch.tensor([axes[0], 0, 2])[:, None]
    norm.valid = {axes[0]: valid}
    out = norm(x)
    seen = x.movedim(1, -1)[valid]
    expected = reference(seen.reshape(-1, 4)).reshape(seen.shape)
    kept = out.movedim(1, -1)
    torch.testing.assert_close(kept[valid], expected)
    assert float(kept[~valid].abs().max()) == 0.0
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), [x, *norm.parameters()], retain_graph=True)
    loss = (expected * weights.movedim(1, -1)[valid]).sum()
    for a, b in zip(got, torch.autograd.grad(loss, [x, *reference.parameters()]), strict=True):
        torch.testing.assert_close(a, b)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(reference, name))


def test_a_bf16_model_keeps_the_norms_statistics_and_gradients_in_fp32():
    norm = MapBatchNorm(4).to(torch.bfloat16)
    x = torch.randn(2, 4, 5, 6).bfloat16().requires_grad_()
    out = norm(x, torch.tensor([True, False]))
    out.square().sum().backward()
    assert (out.dtype, x.grad.dtype, norm.running_mean.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32,
    )  # fmt: skip
    twin = MapBatchNorm(4)
    exact = x.detach().float().requires_grad_()
    twin(exact, torch.tensor([True, False])).square().sum().backward()
    torch.testing.assert_close(norm.running_var, twin.running_var)
    torch.testing.assert_close(norm.bias.grad.float(), twin.bias.grad, atol=0.3, rtol=0.05)


def test_items_that_are_not_finite_leave_running_statistics_alone():
    norm = MapBatchNorm(2)
    norm(torch.randn(2, 2, 3, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((2, 2, 3, 3), float("inf")))
    assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("make", [lambda: ConvAV8(1, 2), lambda: EfficientNetB0(1, drop_path=0.0)])
def test_dummy_items_change_nothing(make):
    net = make().train()
    twin = make().train()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(3, 1, 32, 48)
    with_dummy = torch.cat([x, 50 * torch.randn(1, 1, 32, 48)])
    valid = torch.tensor([True, True, True, False])
    a, _ = net(x, valid_P=valid[:3])
    b, _ = twin(with_dummy, valid_P=valid)
    torch.testing.assert_close(b[:3], a, atol=1e-4, rtol=1e-4)
    a.square().mean().backward()
    b[:3].square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)
    for p, q in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    assert all(m.valid is None for m in net.modules() if isinstance(m, MapBatchNorm))


def test_inputs_behind_a_length_change_nothing():
    net = ConvAV8(1, 2).eval()
    x, lengths = torch.randn(2, 1, 64, 32), torch.tensor([64, 40])
    other = x.clone()
    other[1, :, 40:] = 9.0
    assert torch.equal(net(x, lengths)[0], net(other, lengths)[0])
    assert net.out_lengths(lengths).tolist() == [4, 2]
    assert net.out_lengths(lengths, rank=3) is lengths


def test_too_small_inputs_are_refused():
    with pytest.raises(UserError, match="too small"):
        ConvAV8(1, 2)(torch.zeros(1, 1, 8, 8))
