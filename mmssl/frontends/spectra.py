"""Log-mel and log-linear spectrograms with an explicit parameter record.

P items, S samples, T frames, F bands. Work is always in fp32 and outside autocast: a half-precision
window or filter bank ruins quiet bands. The transforms are kept per device and are no buffers, so
that neither a checkpoint nor a cast of the model touches them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from mmssl.frontends.lengths import FRAMINGS, first_frame, spectrogram_frames
from mmssl.frontends.patches import zero_behind
from mmssl.types import UserError

WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
}  # periodic, as torch's default
LOGS = ("ln_eps", "ln_1e4", "db", "ln_clip", "ln_clip5", "log10_eps", "none")


@dataclass(frozen=True)
class SpectrumParams:
    """Everything that decides the numbers of a spectrogram.

    sample_rate Hz; n_fft, win, hop samples; f_min, f_max Hz (f_max 0 = half the rate); power 1 =
    magnitude, 2 = power; framing as in `lengths.spectrogram_frames`; mel_scale htk or slaney,
    mel_norm "" or slaney. log rule on a band x: ln_eps = ln(x + floor), ln_1e4 = ln(1 + 1e4 x)
    (MMV), ln_clip = ln(clip(x, floor, 1e8)) (COLA), ln_clip5 = ln(max(x, floor)) / 5 (L3-Net),
    log10_eps = log10(x + floor) (Fonseca), db = 10 log10(max(x, floor)) minus the item's maximum,
    cut at -db_range (OpenL3), none = x. mean, std: fixed numbers applied after the log, (y - mean)
    / std.
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    win: int = 400
    hop: int = 160
    n_mels: int = 64
    f_min: float = 60.0
    f_max: float = 7800.0
    power: float = 1.0
    framing: str = "center"
    window: str = "hann"
    mel_scale: str = "htk"
    mel_norm: str = ""
    log: str = "ln_clip"
    floor: float = 1e-5
    db_range: float = 80.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("framing", self.framing, FRAMINGS),
            ("window", self.window, tuple(WINDOWS)),
            ("log", self.log, LOGS),
            ("mel_scale", self.mel_scale, ("htk", "slaney")),
            ("mel_norm", self.mel_norm, ("", "slaney")),
        ):
            if value not in known:
                raise UserError(f"spectrum.{name}: {value!r} is not known; use one of {known}")
        if self.win > self.n_fft:
            raise UserError(f"spectrum.win: {self.win} exceeds n_fft {self.n_fft}; raise n_fft")
        if self.top > self.sample_rate / 2 or self.f_min >= self.top:
            raise UserError(
                f"spectrum.f_max: the range {self.f_min}-{self.top} Hz must increase and end at "
                f"half the sample rate ({self.sample_rate / 2} Hz) at most"
            )
        if self.std <= 0:
            raise UserError(f"spectrum.std: {self.std} must be positive")

    @property
    def top(self) -> float:
        """Upper edge of the bands in Hz."""
        return self.f_max or self.sample_rate / 2

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop


class Spectrum(nn.Module):
    """Base of the two spectrograms: framing, transform, log rule, fixed normalisation."""

    def __init__(self, params: SpectrumParams) -> None:
        super().__init__()
        self.params = params
        self._by_device: dict[torch.device, nn.Module] = {}

    @property
    def bands(self) -> int:
        """Bands of one frame."""
        raise NotImplementedError

    def _transform(self) -> nn.Module:
        raise NotImplementedError

    def frames(self, samples: int) -> int:
        """Frames of a waveform of that many samples."""
        return spectrogram_frames(samples, self.params.win, self.params.hop, self.params.framing)

    @property
    def first_centre(self) -> float:
        """Centre of the first frame, in frames."""
        return first_frame(self.params.win, self.params.hop, self.params.framing)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(T, F) of a waveform with axes (S,)."""
        return self.frames(shape[0]), self.bands

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Frames of items with that many valid samples, at least 1 where there are any, else 0."""
        p = self.params
        spare = {"center": p.hop, "valid": p.hop - p.win, "pad_end": p.hop - 1}[p.framing]
        steps = torch.div(lengths_P + spare, p.hop, rounding_mode="floor")
        return steps.clamp(min=1) * (lengths_P > 0)

    def forward(self, wave_PS: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """(P, S) or (P, 1, S) in [-1, 1] to fp32 (P, 1, T, F); samples behind a length are zero.

        Raises:
            UserError: several channels, or a waveform too short for one frame.
        """
        wave = zero_behind(mono(wave_PS).float(), lengths_P, axis=1)
        shortest = self.params.n_fft // 2 + 1 if self.params.framing == "center" else 1
        if self.frames(wave.shape[1]) < 1 or wave.shape[1] < shortest:
            raise UserError(
                f"a waveform of {wave.shape[1]} samples is shorter than one window "
                f"({self.params.win} of n_fft {self.params.n_fft}); use a longer audio view"
            )
        if wave.device not in self._by_device:
            with torch.inference_mode(False):  # what is kept must serve training too
                self._by_device[wave.device] = self._transform().to(wave.device)
        with torch.autocast(wave.device.type, enabled=False):
            bands_PFT: Tensor = self._by_device[wave.device](self._framed(wave))
            out = _compress(bands_PFT, self.params)
        return ((out - self.params.mean) / self.params.std).transpose(1, 2).unsqueeze(1)

    def linear(self, x: Tensor) -> Tensor:
        """Bands before their logarithm, of what `forward` returned; for log rule ln_eps."""
        p = self.params
        return ((x * p.std + p.mean).exp() - p.floor).clamp(min=0)

    def logarithmic(self, bands: Tensor) -> Tensor:
        """The inverse of `linear`."""
        return (_compress(bands, self.params) - self.params.mean) / self.params.std

    def _framed(self, wave_PS: Tensor) -> Tensor:
        """Pad so that the window, which lies centred in n_fft, meets the framing's samples."""
        p = self.params
        if p.framing == "center":
            return wave_PS
        left = (p.n_fft - p.win) // 2
        right = p.n_fft - p.win - left
        if p.framing == "pad_end":
            right += max(0, (self.frames(wave_PS.shape[1]) - 1) * p.hop + p.win - wave_PS.shape[1])
        return F.pad(wave_PS, (left, right))


class LogSpectrogram(Spectrum):
    """Log of the linear-frequency spectrogram: n_fft / 2 + 1 bands (L3-Net, AVE-Net)."""

    @property
    def bands(self) -> int:
        """Bands of one frame."""
        return self.params.n_fft // 2 + 1

    def _transform(self) -> nn.Module:
        p = self.params
        transform: nn.Module = torchaudio.transforms.Spectrogram(
            p.n_fft,
            p.win,
            p.hop,
            power=p.power,
            window_fn=WINDOWS[p.window],
            center=p.framing == "center",
        )
        return transform


class LogMel(Spectrum):
    """Log of the mel spectrogram: n_mels bands."""

    @property
    def bands(self) -> int:
        """Bands of one frame."""
        return self.params.n_mels

    def _transform(self) -> nn.Module:
        p = self.params
        transform: nn.Module = torchaudio.transforms.MelSpectrogram(
            p.sample_rate,
            n_fft=p.n_fft,
            win_length=p.win,
            hop_length=p.hop,
            f_min=p.f_min,
            f_max=p.top,
            n_mels=p.n_mels,
            power=p.power,
            window_fn=WINDOWS[p.window],
            center=p.framing == "center",
            mel_scale=p.mel_scale,
            norm=p.mel_norm or None,
        )
        return transform


def mono(wave: Tensor) -> Tensor:
    """(P, S) of (P, S) or (P, 1, S).

    Raises:
        UserError: several channels.
    """
    if wave.ndim == 3 and wave.shape[1] == 1:
        return wave[:, 0]
    if wave.ndim != 2:
        raise UserError(
            f"audio towers take mono waveforms (P, S) or (P, 1, S), got {tuple(wave.shape)}; "
            "mix the channels down first"
        )
    return wave


def _compress(x_PFT: Tensor, p: SpectrumParams) -> Tensor:
    if p.log == "ln_eps":
        return (x_PFT + p.floor).log()
    if p.log == "ln_1e4":
        return (1e4 * x_PFT).log1p()
    if p.log == "ln_clip":
        return x_PFT.clamp(p.floor, 1e8).log()
    if p.log == "ln_clip5":
        return x_PFT.clamp(min=p.floor).log() / 5
    if p.log == "log10_eps":
        return (x_PFT + p.floor).log10()
    if p.log == "db":
        level = x_PFT.clamp(min=p.floor).log() * (10 / math.log(10))
        return (level - level.amax(dim=(1, 2), keepdim=True)).clamp(min=-p.db_range)
    return x_PFT
