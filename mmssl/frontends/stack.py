"""Three time-frequency pictures of a sound as channels. P items, S samples, T frames, F bands."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.frontends.patches import zero_behind
from mmssl.frontends.spectra import LogMel, SpectrumParams, mono

_QUIET = 1e-5


class SpectrumStack(LogMel):
    """Log-frequency spectrum, its phase, and mel spectrum of a waveform (CLAR, 2021).

    Channels: 20 log10 of the magnitude - 20 dB, phase in radians, 10 log10 of the mel power - 10
    dB; values below 1e-5 count as that. The bands of the first two are as many as those of the
    third, with centres in even ratios from f_min to f_max.

    params: of the mel spectrum; its log rule is not read.
    """

    channels = 3

    def __init__(self, params: SpectrumParams) -> None:
        super().__init__(replace(params, log="none", power=2, mean=0.0, std=1.0))
        self._kernels: dict[torch.device, Tensor] = {}

    def forward(self, wave_PS: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """(P, S) or (P, 1, S) in [-1, 1] to fp32 (P, 3, T, F); samples behind a length are zero.

        Raises:
            UserError: as `LogMel`.
        """
        mel = super().forward(wave_PS, lengths_P)
        wave = zero_behind(mono(wave_PS).float(), lengths_P, axis=1)
        if wave.device not in self._kernels:
            self._kernels[wave.device] = self._fourier().to(wave.device)
        half = self.params.n_fft // 2
        with torch.autocast(wave.device.type, enabled=False):
            padded = F.pad(wave[:, None], (half, half), mode="reflect")[:, 0]
            frames = padded.unfold(1, self.params.n_fft, self.params.hop)
            real, imaginary = (frames @ self._kernels[wave.device]).chunk(2, -1)
            level = 20 * torch.hypot(real, imaginary).clamp(min=_QUIET).log10() - 20
            phase = torch.atan2(imaginary, real)
            mel = 10 * mel[:, 0].clamp(min=_QUIET).log10() - 10
        return torch.stack([level, phase, mel], 1)

    def _fourier(self) -> Tensor:
        """(n_fft, 2 F) windowed cosines and negative sines."""
        p = self.params
        place = torch.arange(p.n_mels, dtype=torch.float64) / p.n_mels
        hz = p.f_min * (p.top / p.f_min) ** place
        angle = torch.arange(p.n_fft, dtype=torch.float64)[:, None] * hz
        angle = angle * (2 * math.pi / p.sample_rate)
        window = torch.hann_window(p.n_fft, dtype=torch.float64)[:, None]
        return (torch.cat([angle.cos(), -angle.sin()], 1) * window).float()
