"""Augmentations of log-mel spectrograms against torch's operations, item by item."""

import pytest
import torch
from torch.nn import functional as F

from mmssl.rng import row_uniform
from mmssl.views.spec import linear_fader, mix_exp, random_resize_crop

T, BANDS = 24, 16
FULL = {"canvas": 1.5, "time": (0.6, 1.5), "bands": (0.6, 1.5)}
SEEDS = torch.arange(100, 140)


def maps(rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, T, BANDS, generator=generator, dtype=torch.float64)


def cropped(x_TF, u):
    """BYOL-A's crop of one item, through torch's bicubic interpolation."""
    canvas = F.pad(x_TF, (0, 0, T // 4, T // 4))
    width, height = int((0.6 + 0.9 * u[0]) * T), int(min(0.6 + 0.9 * u[1], 1.0) * BANDS)
    left, low = int(u[2] * (len(canvas) - width + 1)), int(u[3] * (BANDS - height + 1))
    part = canvas[left : left + width, low : low + height]
    size = (T, BANDS)
    return F.interpolate(part[None, None], size, mode="bicubic", align_corners=True)[0, 0], part


def test_resize_crop_is_torchs_bicubic_of_a_crop_of_the_canvas():
    x = maps()
    out = random_resize_crop(x, SEEDS, **FULL)
    shapes = set()
    for item, u in enumerate(row_uniform(SEEDS, 4, "resize_crop").double().tolist()):
        want, part = cropped(x[item, 0], u)
        shapes.add(tuple(part.shape))
        torch.testing.assert_close(out[item, 0], want, atol=1e-12, rtol=0)
    widths, heights = zip(*shapes, strict=True)
    assert min(widths) < 0.75 * T < 1.3 * T < max(widths)
    assert min(heights) < 0.75 * BANDS
    assert max(heights) == BANDS


def test_a_crop_of_everything_is_the_input():
    x = maps()
    same = random_resize_crop(x, SEEDS, canvas=1.0, time=(1, 1), bands=(1, 1))
    torch.testing.assert_close(same, x, atol=1e-12, rtol=0)


def test_draws_belong_to_the_item():
    x = maps()
    whole = random_resize_crop(x, SEEDS, **FULL)
    part = random_resize_crop(x[5:7], SEEDS[5:7], **FULL)
    torch.testing.assert_close(part, whole[5:7], atol=1e-12, rtol=0)
    assert not torch.equal(random_resize_crop(x[:1], SEEDS[1:2], **FULL), whole[:1])


def test_a_crop_keeps_its_precision_under_autocast():
    x = maps().float()
    want = random_resize_crop(x, SEEDS, **FULL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_resize_crop(x, SEEDS, **FULL), want)


def test_mixing_adds_energies():
    x, other = maps(), maps(seed=1)
    share = torch.linspace(0, 0.4, 40, dtype=torch.float64)
    out = mix_exp(x, other, share)
    weight = share[:, None, None, None]
    torch.testing.assert_close(out.exp(), (1 - weight) * x.exp() + weight * other.exp())
    assert torch.equal(out[0], x[0])
    far = torch.full_like(x, 1000.0)  # in the log domain there is nothing to overflow
    torch.testing.assert_close(mix_exp(far, far, share), far)


def test_the_fader_is_a_line_between_uniform_ends():
    zero = torch.zeros(2000, 1, T, BANDS)
    line = linear_fader(zero, torch.arange(2000), gain=0.5)
    assert float(line.diff(n=2, dim=2).abs().max()) < 1e-6
    assert not line.diff(dim=3).any()
    ends = line[:, 0, [0, -1], 0]
    assert float(ends.abs().max()) == pytest.approx(0.5, abs=0.01)
    assert float(ends.mean()) == pytest.approx(0, abs=0.02)
    assert float(ends.var()) == pytest.approx(0.25 / 3, rel=0.05)
    assert abs(float(torch.corrcoef(ends.T)[0, 1])) < 0.1
