"""Band-pass filters with two learned cut-offs each. P items, S samples, C filters, K taps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.types import UserError


class SincConv(nn.Module):
    """Unpadded convolution of a waveform with windowed sinc filters (SincNet, 2018).

    A filter is the difference of two low-passes, 2 f sinc(2 pi f n), times a Hamming window,
    scaled so that its middle tap is 1: its gain in the pass band is rate / (2 (f2 - f1)). The
    cut-offs are f1 = 50 + |low_hz| and f2 = min(f1 + 50 + |band_hz|, rate / 2) in Hz, and start
    evenly spaced in mel between 30 Hz and rate / 2 - 100 Hz.

    Both parameters have one dimension, so that weight decay, which would drag them to 50 Hz, leaves
    them alone; filters are made in fp32 and outside autocast, as bf16 has steps of 16 Hz at 4 kHz.
    """

    FLOOR_HZ, BAND_HZ, LOWEST_HZ = 50.0, 50.0, 30.0

    def __init__(self, filters: int = 80, kernel: int = 251, sample_rate: int = 16000) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise UserError(f"sinc kernel: {kernel} taps have no middle; make it odd")
        self.sample_rate, self.kernel = sample_rate, kernel
        top = sample_rate / 2 - (self.FLOOR_HZ + self.BAND_HZ)
        mel = torch.linspace(_mel(self.LOWEST_HZ), _mel(top), filters + 1, dtype=torch.float64)
        edges = (700 * (10 ** (mel / 2595) - 1)).float()
        self.low_hz, self.band_hz = nn.Parameter(edges[:-1]), nn.Parameter(edges.diff())

    def filters(self) -> Tensor:
        """(C, K) taps, fp32."""
        low = self.FLOOR_HZ + self.low_hz.float().abs()
        high = (low + self.BAND_HZ + self.band_hz.float().abs()).clamp(max=self.sample_rate / 2)
        half = self.kernel // 2
        # the release's window: spread over half - 0.5 instead of half taps
        spread = torch.linspace(0, self.kernel / 2 - 1, half, device=low.device)
        window = 0.54 - 0.46 * torch.cos(2 * math.pi * spread / self.kernel)
        time = torch.arange(-half, 0, device=low.device) * (2 * math.pi / self.sample_rate)
        waves = torch.sin(high[:, None] * time) - torch.sin(low[:, None] * time)
        left = waves / (time / 2) * window / (2 * (high - low))[:, None]
        return torch.cat([left, torch.ones_like(left[:, :1]), left.flip(1)], 1)

    def forward(self, wave_P1S: Tensor) -> Tensor:
        """(P, 1, S) to (P, C, S - K + 1)."""
        with torch.autocast(wave_P1S.device.type, enabled=False):
            return F.conv1d(wave_P1S.float(), self.filters()[:, None])


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)
