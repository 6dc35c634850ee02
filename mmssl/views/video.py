"""Operations on the frames of one clip: (T, H, W, 3) uint8. Every draw holds for all frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mmssl.types import UserError


def horizontal_flip(
    frames_THWC: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Mirror left and right."""
    if torch.rand((), generator=generator).item() >= probability:
        return frames_THWC
    return frames_THWC.flip(2)


def random_resized_crop(
    frames_THWC: Tensor,
    generator: torch.Generator,
    size: int,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut one random rectangle out of all frames and resize it (Szegedy et al. 2015).

    Args:
        frames_THWC: the frames.
        generator: draws area, aspect ratio and place.
        size: side of the result in pixels; 0 keeps the short side of the input.
        scale: area of the rectangle as a share of the frame.
        ratio: width / height, drawn uniformly in logarithm.
    """
    height, width = frames_THWC.shape[1:3]
    side = size or min(height, width)
    u = torch.rand(4, generator=generator).tolist()
    area = (scale[0] + (scale[1] - scale[0]) * u[0]) * height * width
    aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    w = max(1, min(width, round(math.sqrt(area * aspect))))
    h = max(1, min(height, round(math.sqrt(area / aspect))))
    top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
    cut_TCHW = frames_THWC.permute(0, 3, 1, 2)
    out: Tensor = F.resized_crop(cut_TCHW, top, left, h, w, [side, side], antialias=True)
    return out.permute(0, 2, 3, 1)


def color_jitter(
    frames_THWC: Tensor,
    generator: torch.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 1.0,
) -> Tensor:
    """Change brightness, contrast and saturation by factors 1 +- x and hue by +- `hue` turns."""
    u = torch.rand(5, generator=generator).tolist()
    if u[0] >= probability:
        return frames_THWC
    x = frames_THWC.permute(0, 3, 1, 2)
    for share, adjust, value in (
        (brightness, F.adjust_brightness, u[1]),
        (contrast, F.adjust_contrast, u[2]),
        (saturation, F.adjust_saturation, u[3]),
    ):
        if share:
            x = adjust(x, max(0.0, 1 + share * (2 * value - 1)))
    if hue:
        x = F.adjust_hue(x, hue * (2 * u[4] - 1))
    return x.permute(0, 2, 3, 1)


def grayscale(
    frames_THWC: Tensor, generator: torch.Generator, probability: float = 0.2
) -> Tensor:
    """Take the colours away."""
    if torch.rand((), generator=generator).item() >= probability:
        return frames_THWC
    return F.rgb_to_grayscale(frames_THWC.permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)


def blur(
    frames_THWC: Tensor,
    generator: torch.Generator,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> Tensor:
    """Gaussian blur of random width, in pixels, by a kernel of a tenth of the height (SimCLR)."""
    u = torch.rand(2, generator=generator).tolist()
    if u[0] >= probability:
        return frames_THWC
    kernel = frames_THWC.shape[1] // 20 * 2 + 1
    width = sigma[0] + (sigma[1] - sigma[0]) * u[1]
    out: Tensor = F.gaussian_blur(frames_THWC.permute(0, 3, 1, 2), [kernel] * 2, [width] * 2)
    return out.permute(0, 2, 3, 1)


def solarize(
    frames_THWC: Tensor,
    generator: torch.Generator,
    threshold: int = 128,
    probability: float = 0.2,
) -> Tensor:
    """Invert the values from `threshold` on (BYOL)."""
    if torch.rand((), generator=generator).item() >= probability:
        return frames_THWC
    return torch.where(frames_THWC >= threshold, 255 - frames_THWC, frames_THWC)


def fit(frames_THWC: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Crop frames to size x size: at the centre or, with a generator, anywhere.

    Raises:
        UserError: the frames are smaller than `size`.
    """
    height, width = frames_THWC.shape[1:3]
    if size == 0 or (height, width) == (size, size):
        return frames_THWC
    if min(height, width) < size:
        raise UserError(f"frames of {width} x {height} cannot be cropped to {size} x {size}")
    u = [0.5, 0.5] if generator is None else torch.rand(2, generator=generator).tolist()
    top, left = int(u[0] * (height - size + 1)), int(u[1] * (width - size + 1))
    return frames_THWC[:, top : top + size, left : left + size]
