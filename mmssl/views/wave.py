"""Operations on one waveform: (S,) float32 in [-1, 1]; S samples."""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor

_TINY = 1e-12  # keeps the ratio of two silences finite


def gain(wave_S: Tensor, generator: torch.Generator, db: tuple[float, float] = (-6, 6)) -> Tensor:
    """Multiply by a random gain, uniform in decibels; louder than full scale is clipped."""
    low, high = db
    value = low + (high - low) * torch.rand((), generator=generator).item()
    return (wave_S * 10 ** (value / 20)).clamp(-1, 1)


def rescale(
    wave_S: Tensor, generator: torch.Generator, peak: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Give the crop a random maximum, uniform in its amplitude (PASE); silence stays zero."""
    low, high = peak
    value = low + (high - low) * torch.rand((), generator=generator).item()
    loudest = wave_S.abs().max() if wave_S.numel() else wave_S.new_zeros(())
    return wave_S * (value / loudest.clamp(min=_TINY))


def noise(
    wave_S: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.0, 0.01)
) -> Tensor:
    """Add white Gaussian noise; its standard deviation is a random share of the crop's maximum."""
    low, high = scale
    share = low + (high - low) * torch.rand((), generator=generator).item()
    peak = wave_S.abs().max() if wave_S.numel() else wave_S.new_zeros(())
    return wave_S + share * peak * torch.randn(wave_S.shape, generator=generator)


FADES = ("linear", "exponential", "logarithmic", "quarter_sine", "half_sine")


def fade(wave_S: Tensor, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """Fade in and out, each over up to half of the crop, along one of five curves (CLAR)."""
    u = torch.rand(4, generator=generator).tolist()
    if u[0] >= probability:
        return wave_S
    half = len(wave_S) // 2
    curve = FADES[int(u[3] * len(FADES))]
    out: Tensor = torchaudio.transforms.Fade(int(u[1] * half), int(u[2] * half), curve)(wave_S)
    return out


def time_mask(
    wave_S: Tensor, generator: torch.Generator, probability: float = 0.5, share: float = 1 / 8
) -> Tensor:
    """Replace a stretch of that share of the crop by noise of standard deviation 0.01 (CLAR)."""
    u = torch.rand(2, generator=generator).tolist()
    length = int(share * len(wave_S))
    if u[0] >= probability or not length:
        return wave_S
    first = int(u[1] * (len(wave_S) - length + 1))
    out = wave_S.clone()
    out[first : first + length] = 0.01 * torch.randn(length, generator=generator)
    return out


def band_noise(
    wave_S: Tensor,
    generator: torch.Generator,
    hz: float,
    band: tuple[float, float] = (80.0, 240.0),
    db: tuple[float, float] = (5.0, 15.0),
) -> Tensor:
    """Add Gaussian noise of the frequencies of a band (Hz) at a random signal-to-noise ratio (dB).

    Power is that of the whole crop (CPC2, Kharitonov et al. 2021, where it is not measured). `hz`:
    sampling rate.
    """
    if not wave_S.numel():
        return wave_S
    ratio = db[0] + (db[1] - db[0]) * torch.rand((), generator=generator).item()
    spectrum = torch.fft.rfft(torch.randn(wave_S.shape, generator=generator))
    at_F = torch.fft.rfftfreq(len(wave_S), 1 / hz)
    spectrum = spectrum * ((at_F >= band[0]) & (at_F <= band[1]))
    added_S = torch.fft.irfft(spectrum, len(wave_S))
    level = wave_S.norm() / added_S.norm().clamp(min=_TINY) * 10 ** (-ratio / 20)
    out_S: Tensor = wave_S + level * added_S
    return out_S


def reverb(
    wave_S: Tensor,
    generator: torch.Generator,
    hz: float,
    decay_s: tuple[float, float] = (0.05, 0.6),
    direct_db: float = 3.0,
) -> Tensor:
    """A random room: the sound and a tail of exponentially decaying Gaussian noise (Polack 1988).

    decay_s: seconds until the tail has fallen by 60 dB. direct_db: of the sound's energy to that of
    the tail. The sound stays in place, and the crop keeps its length and energy. `hz`: sampling
    rate.
    """
    if not wave_S.numel():
        return wave_S
    seconds = decay_s[0] + (decay_s[1] - decay_s[0]) * torch.rand((), generator=generator).item()
    after_T = torch.arange(1, round(seconds * hz) + 1) / hz
    tail_T = torch.randn(after_T.shape, generator=generator) * 10 ** (-3 * after_T / seconds)
    tail_T = tail_T * 10 ** (-direct_db / 20) / tail_T.norm().clamp(min=_TINY)
    room_T = torch.cat([torch.ones(1), tail_T])
    wet_S = torchaudio.functional.fftconvolve(wave_S, room_T)[: len(wave_S)]
    out_S: Tensor = wet_S * (wave_S.norm() / wet_S.norm().clamp(min=_TINY))
    return out_S


_PITCH_STEP = 20  # ratios are multiples of 1/20: resampling by larger numbers is slow


def pitch(
    wave_S: Tensor, generator: torch.Generator, ratio: tuple[float, float] = (0.8, 1.25)
) -> Tensor:
    """Another voice: all frequencies (pitch and formants) times a random ratio, at the same tempo.

    The ratio is uniform in its logarithm, rounded to a twentieth. Time is stretched by a phase
    vocoder in windows of 512 samples, then resampled.
    """
    low, high = (math.log(value) for value in ratio)
    drawn = math.exp(low + (high - low) * torch.rand((), generator=generator).item())
    up = round(drawn * _PITCH_STEP)
    if up == _PITCH_STEP or not wave_S.numel():
        return wave_S
    window = torch.hann_window(512)
    spectrum = torch.stft(wave_S, 512, 128, window=window, return_complex=True, pad_mode="constant")
    advance = torch.linspace(0, math.pi * 128, spectrum.shape[0])[:, None]
    slow = torchaudio.functional.phase_vocoder(spectrum, _PITCH_STEP / up, advance)
    stretched = torch.istft(slow, 512, 128, window=window)
    out = torchaudio.functional.resample(stretched, up, _PITCH_STEP)[: len(wave_S)]
    return torch.nn.functional.pad(out, (0, len(wave_S) - len(out)))


def normalize(wave_S: Tensor) -> Tensor:
    """Zero mean and unit variance over the crop; silence stays zero."""
    centred = wave_S - wave_S.mean()
    return centred / (centred.square().mean().sqrt() + 1e-7)
