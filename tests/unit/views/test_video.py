"""Operations on frames: one draw for all frames, and the right geometry."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from mmssl.types import UserError
from mmssl.views import video


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(count=3, height=8, width=12):
    """Every pixel says where it is."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([x * 20, y * 20, torch.zeros_like(x)], -1).byte()
    return picture.expand(count, -1, -1, -1)


def test_flip_mirrors_all_frames_in_half_of_the_cases():
    flipped = 0
    for seed in range(400):
        out = video.horizontal_flip(ramp(), generator(seed))
        assert torch.equal(out, ramp()) or torch.equal(out, ramp().flip(2))
        flipped += torch.equal(out, ramp().flip(2))
    assert 160 < flipped < 240
    assert torch.equal(video.horizontal_flip(ramp(), generator(), 0.0), ramp())


def test_resized_crop_is_one_rectangle_in_all_frames():
    for seed in range(20):
        out = video.random_resized_crop(ramp(), generator(seed), 6)
        assert out.shape == (3, 6, 6, 3)
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])
        x, y = out[0, 3, :, 0].int(), out[0, :, 3, 1].int()
        assert (x.diff() >= 0).all()
        assert (y.diff() >= 0).all()


def test_resized_crop_areas_and_places():
    """With unit aspect and full area the whole frame is resized; else areas stay in their range."""
    whole = video.random_resized_crop(ramp(1, 12, 12), generator(), 6, (1.0, 1.0), (1.0, 1.0))
    expected = F.resize(ramp(1, 12, 12).permute(0, 3, 1, 2), [6, 6], antialias=True)
    assert torch.equal(whole, expected.permute(0, 2, 3, 1))
    spans = [
        int(out[0, 0, -1, 0]) - int(out[0, 0, 0, 0])
        for out in (
            video.random_resized_crop(ramp(1, 12, 12), generator(s), 12, (0.25, 1.0))
            for s in range(100)
        )
    ]
    assert min(spans) < 120
    assert max(spans) > 180


def test_resized_crop_keeps_the_short_side_without_a_size():
    assert video.random_resized_crop(ramp(2, 8, 12), generator(), 0).shape == (2, 8, 8, 3)


def test_jitter_is_one_change_for_all_frames():
    out = video.color_jitter(ramp(), generator(3))
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out, ramp())
    assert out.dtype == torch.uint8
    still = video.color_jitter(ramp(), generator(), 0, 0, 0, 0)
    assert torch.equal(still, ramp())
    assert torch.equal(video.color_jitter(ramp(), generator(), probability=0.0), ramp())


def test_brightness_equals_torchvision():
    u = torch.rand(5, generator=generator(5)).tolist()
    out = video.color_jitter(ramp(), generator(5), 0.4, 0, 0, 0)
    expected = F.adjust_brightness(ramp().permute(0, 3, 1, 2), 1 + 0.4 * (2 * u[1] - 1))
    assert torch.equal(out, expected.permute(0, 2, 3, 1))


def noise(count=2, side=40):
    return torch.randint(0, 256, (count, side, side, 3), generator=generator(1)).byte()


@pytest.mark.parametrize(("name", "share"), [("grayscale", 0.2), ("blur", 0.5), ("solarize", 0.2)])
def test_changes_of_colour_and_sharpness_happen_as_often_as_published(name, share):
    changed = sum(
        not torch.equal(getattr(video, name)(noise(1, 20), generator(seed)), noise(1, 20))
        for seed in range(300)
    )
    assert changed / 300 == pytest.approx(share, abs=0.08)
    same = getattr(video, name)(noise(), generator(), probability=0.0)
    assert torch.equal(same, noise())


def test_grayscale_has_the_luma_in_all_channels():
    out = video.grayscale(noise(), generator(), probability=1.0)
    luma = noise().double() @ torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    assert float((out - luma[..., None]).abs().max()) <= 1.0


def test_blur_is_one_gaussian_of_a_tenth_of_the_height_for_all_frames():
    spike = torch.zeros(2, 40, 40, 3, dtype=torch.uint8)
    spike[:, 20, 20] = 255
    out = video.blur(spike, generator(), sigma=(2.0, 2.0), probability=1.0)
    assert torch.equal(out[0], out[1])
    column = out[0, :, 20, 0].double()
    assert column.nonzero().flatten().tolist() == [18, 19, 20, 21, 22]  # a kernel of 5
    ratio = float(column[19] / column[20])
    assert ratio == pytest.approx(torch.tensor(-1 / 8).exp().item(), abs=0.05)


def test_solarize_inverts_what_is_bright():
    out = video.solarize(noise(), generator(), probability=1.0)
    assert torch.equal(out, torch.where(noise() < 128, noise(), 255 - noise()))


def test_fit_refuses_small_frames():
    assert torch.equal(video.fit(ramp(), 0, None), ramp())
    with pytest.raises(UserError, match="12 x 8 cannot be cropped to 9 x 9"):
        video.fit(ramp(), 9, None)
