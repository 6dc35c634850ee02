"""Decoded frames as a float signal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.frontends.patches import zero_behind
from mmssl.types import UserError

Numbers = float | tuple[float, ...]

CHANNELS = {"rgb": 3, "motion": 1, "rgb_motion": 4, "foreground": 4}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours in [0, 1]
# factors and summands of bytes, of all colours or of each
RANGES: dict[str, tuple[Numbers, Numbers]] = {
    "signed": (2 / 255, -1.0),
    "unit": (1 / 255, 0.0),
    "imagenet": (
        tuple(1 / (255 * std) for std in _STD),
        tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True)),
    ),
}
NETWORK = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


class Frames(nn.Module):
    """uint8 frames (P, T, H, W, 3) to fp32 (P, C, T, H, W).

    values: `signed` for [-1, 1], `unit` for [0, 1], `imagenet` for colours standardised by the
    statistics of ImageNet.
    channels: `rgb`; `motion`, one channel that shows what moves, tanh(motion_gain * d) with d the
    largest difference of a colour from the clip's background, in [0, 1]; `rgb_motion`, both; or
    `foreground`, both with the colours multiplied by the motion. The background is the median of
    nine frames spread over the clip. Motion is the same for all colours; it and the foreground are
    zero in a still clip: on small data they keep a network from memorising backgrounds. They mix
    the frames of one place: masks must hide whole tubes.

    The result is a view over channels-last memory: folding time into the batch gives channels-last
    images.
    """

    def __init__(
        self, values: str = "signed", channels: str = "rgb", motion_gain: float = 8.0
    ) -> None:
        super().__init__()
        if channels not in CHANNELS:
            raise UserError(
                f"frames.channels: {channels!r} is not known; use one of {', '.join(CHANNELS)}"
            )
        if values not in RANGES:
            raise UserError(
                f"frames.values: {values!r} is not known; use one of {', '.join(RANGES)}"
            )
        self.channels, self.motion_gain = channels, motion_gain
        self.gain, self.shift = RANGES[values]
        self.motion_channel = None if channels == "rgb" else CHANNELS[channels] - 1

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of the output, (T, H, W), for frames with axes (T, H, W, 3)."""
        return shape[:3]

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid frames: the same."""
        return lengths_P

    def forward(self, frames_PTHWC: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """Scale, move the channels to the front and set frames behind a length to zero.

        Raises:
            UserError: anything but uint8 RGB frames.
        """
        shape = tuple(frames_PTHWC.shape)
        if len(shape) != 5 or shape[-1] != 3 or frames_PTHWC.dtype != torch.uint8:
            raise UserError(
                f"video takes uint8 frames (P, T, H, W, 3), got {frames_PTHWC.dtype} {shape}"
            )
        parts = []
        if self.channels != "motion":
            gain, shift = (_like(x, frames_PTHWC) for x in (self.gain, self.shift))
            parts.append(frames_PTHWC.float().mul_(gain).add_(shift))
        if self.channels != "rgb":
            parts.append(motion(frames_PTHWC, lengths_P).mul_(self.motion_gain).tanh_())
        if self.channels == "foreground":
            parts[0].mul_(parts[1])
        signal = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return zero_behind(signal, lengths_P, axis=1).movedim(-1, 1)


def _like(numbers: Numbers, frames: Tensor) -> float | Tensor:
    if isinstance(numbers, float):
        return numbers
    return torch.tensor(numbers, device=frames.device)


def motion(frames_PTHWC: Tensor, lengths_P: Tensor | None = None) -> Tensor:
    """(P, T, H, W, 1) largest colour difference from the clip's background, in [0, 1].

    Works on bytes: that is fast on a CPU, where this runs for every frame of a batch.
    """
    still = background(frames_PTHWC, lengths_P)
    change = torch.maximum(frames_PTHWC, still) - torch.minimum(frames_PTHWC, still)
    largest = torch.maximum(torch.maximum(change[..., 0], change[..., 1]), change[..., 2])
    return largest.float().div_(255)[..., None]


def background(frames_PTHWC: Tensor, lengths_P: Tensor | None = None) -> Tensor:
    """(P, 1, H, W, 3) median of nine frames spread evenly over each clip's valid part."""
    items, frames = frames_PTHWC.shape[:2]
    place = torch.linspace(0, 1, 9, device=frames_PTHWC.device)
    last = (
        frames_PTHWC.new_full((items,), frames, dtype=torch.long)
        if lengths_P is None
        else lengths_P
    )
    index = (place[None] * (last[:, None] - 1)).round().long()
    rows = torch.arange(items, device=index.device)
    return median_of_nine([frames_PTHWC[rows, index[:, k]] for k in range(9)])[:, None]


def median_of_nine(x: list[Tensor]) -> Tensor:
    """Element-wise median of nine tensors by a network of minima and maxima.

    Nineteen exchanges (Paeth, Graphics Gems 1990); forty times as fast as sorting bytes with torch.
    """
    x = list(x)
    for i, j in NETWORK:
        x[i], x[j] = torch.minimum(x[i], x[j]), torch.maximum(x[i], x[j])
    return x[4]
