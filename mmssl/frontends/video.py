"""Decoded frames as a float signal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.frontends.patches import zero_behind
from mmssl.types import UserError

RANGES = {"signed": (2 / 255, -1.0), "unit": (1 / 255, 0.0)}


class Frames(nn.Module):
    """uint8 frames (P, T, H, W, 3) to fp32 (P, 3 or 6, T, H, W).

    values: `signed` for [-1, 1], `unit` for [0, 1].
    residual: six channels instead of three, the frames and behind them their difference from the
    clip's mean frame, which shows what moves. A hidden cell reaches the mean of its own place only:
    mask whole tubes with it.

    The result is a view over channels-last memory: folding time into the batch gives channels-last
    images.
    """

    def __init__(self, values: str = "signed", residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        if values not in RANGES:
            raise UserError(
                f"frames.values: {values!r} is not known; use one of {', '.join(RANGES)}"
            )
        self.gain, self.shift = RANGES[values]

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
        scaled = frames_PTHWC.float().mul_(self.gain).add_(self.shift)
        if self.residual:
            scaled = torch.cat([scaled, scaled - _mean_frame(scaled, lengths_P)], dim=-1)
        return zero_behind(scaled, lengths_P, axis=1).movedim(-1, 1)


def _mean_frame(frames_PTHWC: Tensor, lengths_P: Tensor | None) -> Tensor:
    """(P, 1, H, W, C) mean over the valid frames."""
    if lengths_P is None:
        return frames_PTHWC.mean(dim=1, keepdim=True)
    total = zero_behind(frames_PTHWC, lengths_P, axis=1).sum(dim=1, keepdim=True)
    return total / lengths_P.reshape(-1, 1, 1, 1, 1)
