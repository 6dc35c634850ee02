"""MMV's acceptance 6: a video network becomes an image network."""

import itertools

import pytest
import torch
from torch import nn

from mmssl.backbones.convnets import MapBatchNorm
from mmssl.backbones.deflation import deflated, refit
from mmssl.backbones.resnet import ResNetV2, TemporalShift
from mmssl.backbones.s3d import S3DG

MAKERS = {
    "s3dg": lambda **more: S3DG(channels=8, **more),
    "tsm": lambda **more: ResNetV2(3, channels=8, blocks=[1, 1, 1, 1], **{"shift": 0.125, **more}),
}


def network(kind, **more):
    """A network whose batch norms have seen videos, and whose gains are not all alike."""
    torch.manual_seed(0)
    net = MAKERS[kind](**more).train()
    for norm in (m for m in net.modules() if isinstance(m, MapBatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    for _ in range(10):
        net(torch.rand(8, 3, 8, 32, 32) * torch.rand(8, 3, 1, 1, 1))
    return net.eval()


def images(count, seed):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=g)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def still(images_P3HW, frames):
    return images_P3HW[:, :, None].expand(-1, -1, frames, -1, -1)


def no_zeros_in_time(net):
    """The clip goes round in circles instead of ending in zeros."""
    for part in net.modules():
        if isinstance(part, TemporalShift):
            part.forward = _rolled.__get__(part)
        if isinstance(part, nn.Conv3d) and part.kernel_size[0] > 1:
            part.forward = _circular.__get__(part)


def _circular(conv, x):
    """The convolution with circular padding along time and zeros in space."""
    time, *space = conv.padding
    x = nn.functional.pad(x, (0, 0, 0, 0, time, time), mode="circular")
    return nn.functional.conv3d(x, conv.weight, None, conv.stride, (0, *space))


def _rolled(shift, x):
    clip = x.unflatten(0, (-1, shift.frames))
    moved = int(x.shape[1] * shift.share)
    parts = clip[:, :, :moved], clip[:, :, moved:-moved], clip[:, :, -moved:]
    return torch.cat([parts[0].roll(1, 1), parts[1], parts[2].roll(-1, 1)], 2).flatten(0, 1)


@pytest.mark.parametrize("kind", MAKERS)
def test_without_zeros_in_time_the_deflated_network_is_exact(kind):
    video = network(kind)
    image = deflated(video)
    no_zeros_in_time(video)
    x = images(4, 1)
    expected, grid = video(still(x, 16))
    got, own = image(x[:, :, None])
    assert own == (1, *grid[1:])
    for step in expected.unflatten(1, grid).unbind(1):
        torch.testing.assert_close(got, step.flatten(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_frames_are_read_one_by_one(kind):
    image = deflated(network(kind))
    clip = torch.rand(2, 3, 5, 32, 32)
    tokens, grid = image(clip)
    assert grid == image.grid((5, 32, 32)) == (5, 1, 1)
    assert image.time_field() == (1, 1, 0.0)
    for t in range(5):
        torch.testing.assert_close(tokens[:, t : t + 1], image(clip[:, :, t : t + 1])[0])
    lengths = torch.tensor([5, 2])
    assert image.out_lengths(lengths, 3).tolist() == [5, 2]


@pytest.mark.parametrize(("kind", "steps"), [("s3dg", 25), ("tsm", 200)])
def test_fitted_gains_and_biases_halve_what_the_zeros_make(kind, steps):
    video = network(kind)
    image = deflated(video)
    before = {k: v.clone() for k, v in image.state_dict().items()}
    kept = {k: v.clone() for k, v in video.state_dict().items()}
    endless = (images(8, i) for i in itertools.count(100))
    losses = refit(image, video, endless, steps, frames=8)
    assert len(losses) == steps
    x = images(32, 5)  # not fitted to
    target = video(still(x, 8))[0].mean(1)
    apart = [float((net(x[:, :, None])[0].mean(1) - target).detach().abs().mean())
             for net in (deflated(video), image)]  # fmt: skip
    assert apart[0] > 0.01 * float(target.detach().abs().mean())
    assert losses[0] == pytest.approx(apart[0], rel=0.3)
    assert apart[1] < 0.5 * apart[0]
    assert all(torch.equal(v, kept[k]) for k, v in video.state_dict().items())
    norms = {n for n, m in image.named_modules() if isinstance(m, MapBatchNorm)}
    fitted = {f"{n}.{p}" for n in norms for p in ("weight", "bias")}
    changed = {k for k, v in image.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= fitted
    assert len(changed) > 0.9 * len(fitted)  # a channel whose ReLU never opens cannot learn
    assert all(p.grad is None for p in image.parameters())


@pytest.mark.parametrize(
    ("kind", "option"), [("s3dg", {"deflated": True}), ("tsm", {"shift": 0.0})]
)
def test_a_key_of_the_tower_makes_the_same_network_of_a_trained_ones_weights(kind, option):
    video = network(kind)
    image = MAKERS[kind](**option).eval()
    image.load_state_dict(video.state_dict())
    x = images(3, 2)[:, :, None]
    assert torch.equal(image(x)[0], deflated(video)(x)[0])
