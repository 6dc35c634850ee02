"""Operations on one waveform: (S,) float32 in [-1, 1]; S samples."""

from __future__ import annotations

import torch
from torch import Tensor


def gain(wave_S: Tensor, generator: torch.Generator, db: tuple[float, float] = (-6, 6)) -> Tensor:
    """Multiply by a random gain, uniform in decibels; louder than full scale is clipped."""
    low, high = db
    value = low + (high - low) * torch.rand((), generator=generator).item()
    return (wave_S * 10 ** (value / 20)).clamp(-1, 1)


def noise(
    wave_S: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.0, 0.01)
) -> Tensor:
    """Add white Gaussian noise; its standard deviation is a random share of the crop's maximum."""
    low, high = scale
    share = low + (high - low) * torch.rand((), generator=generator).item()
    peak = wave_S.abs().max() if wave_S.numel() else wave_S.new_zeros(())
    return wave_S + share * peak * torch.randn(wave_S.shape, generator=generator)


def normalize(wave_S: Tensor) -> Tensor:
    """Zero mean and unit variance over the crop; silence stays zero."""
    centred = wave_S - wave_S.mean()
    return centred / (centred.square().mean().sqrt() + 1e-7)
