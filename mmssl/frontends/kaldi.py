"""Kaldi's filter banks and cepstra, and what speech methods do to any spectrogram behind them.

P items, S samples, T frames, F bands. `Kaldi` is one more spectrogram, beside those of `spectra`;
`UtteranceFeatures` wraps one: level, deltas, normalisation per utterance and stacking of frames.
torchaudio computes; all is fp32 and outside autocast.

FB80 of Mockingjay and TERA: UtteranceFeatures(Kaldi(KaldiParams()), deltas=..., cmvn=True).
MEL80: UtteranceFeatures(LogMel(SpectrumParams(n_fft=400, win=400, hop=160, n_mels=80, f_min=0,
f_max=0, power=2, log="ln_eps", floor=1e-10)), level_db=-25, cmvn=True). HuBERT's first labels:
UtteranceFeatures(Kaldi(KaldiParams(ceps=13, n_mels=23, window="povey")), deltas=2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.compliance import kaldi

from mmssl.frontends.lengths import first_frame, spectrogram_frames
from mmssl.frontends.patches import zero_behind
from mmssl.frontends.spectra import Spectrum, mono
from mmssl.types import UserError

WINDOWS = ("povey", "hamming", "hanning", "rectangular", "blackman")


@dataclass(frozen=True)
class KaldiParams:
    """Everything that decides the numbers of Kaldi's features, without dither and energy.

    sample_rate Hz; win, hop samples (the transform has the next power of two); f_min, f_max Hz
    (f_max 0 = half the rate); preemphasis 0 = none; a frame's mean is removed. ceps: 0 = natural
    log of the mel energies, else so many cepstral coefficients (C0 first), liftered by `lifter`.
    Samples stay in [-1, 1]: Kaldi's own tools read 16-bit integers, which adds 20.8 to each log.
    """

    sample_rate: int = 16000
    win: int = 400
    hop: int = 160
    n_mels: int = 80
    f_min: float = 20.0
    f_max: float = 0.0
    window: str = "hamming"
    preemphasis: float = 0.97
    ceps: int = 0
    lifter: float = 22.0

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise UserError(
                f"kaldi.window: {self.window!r} is not known; use one of {', '.join(WINDOWS)}"
            )
        if self.ceps > self.n_mels:
            raise UserError(
                f"kaldi.ceps: {self.ceps} coefficients of {self.n_mels} bands; raise n_mels"
            )
        if self.f_min >= self.top or self.top > self.sample_rate / 2:
            raise UserError(
                f"kaldi.f_max: the range {self.f_min}-{self.top} Hz must increase and end at half "
                f"the sample rate ({self.sample_rate / 2} Hz) at most"
            )

    @property
    def top(self) -> float:
        """Upper edge of the bands in Hz."""
        return self.f_max or self.sample_rate / 2

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop


class Kaldi(nn.Module):
    """Kaldi's log-mel filter bank or MFCC; whole windows only."""

    def __init__(self, params: KaldiParams) -> None:
        super().__init__()
        self.params = params

    @property
    def bands(self) -> int:
        """Numbers per frame."""
        return self.params.ceps or self.params.n_mels

    def frames(self, samples: int) -> int:
        """Frames of a waveform of that many samples."""
        return spectrogram_frames(samples, self.params.win, self.params.hop, "valid")

    @property
    def first_centre(self) -> float:
        """Centre of the first frame, in frames."""
        return first_frame(self.params.win, self.params.hop, "valid")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(T, F) of a waveform with axes (S,)."""
        return self.frames(shape[0]), self.bands

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Frames of items with that many valid samples, at least 1 where there are any, else 0."""
        p = self.params
        steps = torch.div(lengths_P + p.hop - p.win, p.hop, rounding_mode="floor")
        return steps.clamp(min=1) * (lengths_P > 0)

    def forward(self, wave_PS: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """(P, S) or (P, 1, S) in [-1, 1] to fp32 (P, 1, T, F); samples behind a length are zero.

        Raises:
            UserError: several channels, or a waveform shorter than a window.
        """
        wave = zero_behind(mono(wave_PS).float(), lengths_P, axis=1)
        if self.frames(wave.shape[1]) < 1:
            raise UserError(
                f"a waveform of {wave.shape[1]} samples is shorter than one window "
                f"({self.params.win}); use a longer audio view"
            )
        with torch.autocast(wave.device.type, enabled=False):
            # frames do not see each other: the windows of all rows, laid end to end, are read as
            # one waveform without overlap, in a single call
            windows_PTW = wave.unfold(1, self.params.win, self.params.hop)
            features = self._features(windows_PTW.reshape(1, -1))
            return features.view(len(wave), 1, -1, features.shape[-1])

    def _features(self, wave_1S: Tensor) -> Tensor:
        """(T, F) of windows laid end to end."""
        p = self.params
        options = {
            "sample_frequency": float(p.sample_rate),
            "frame_length": 1000 * p.win / p.sample_rate,
            "frame_shift": 1000 * p.win / p.sample_rate,
            "num_mel_bins": p.n_mels,
            "low_freq": p.f_min,
            "high_freq": p.f_max,
            "window_type": p.window,
            "preemphasis_coefficient": p.preemphasis,
        }
        out: Tensor
        if p.ceps:
            out = kaldi.mfcc(wave_1S, num_ceps=p.ceps, cepstral_lifter=p.lifter, **options)
        else:
            out = kaldi.fbank(wave_1S, **options)
        return out


class UtteranceFeatures(nn.Module):
    """A spectrogram with what depends on the whole utterance; padding never counts.

    level_db: scale the waveform so that its root mean square has this level (dB re 1) first; None
    leaves it. deltas: append so many derivatives along time, each over 5 frames with repeated edges
    (1 = delta, 2 = and delta-delta). cmvn: then subtract each band's mean and divide by its
    unbiased deviation + 1e-10. stack: then join so many neighbouring frames; a rest that does not
    fill a stack is dropped.
    """

    def __init__(
        self,
        signal: Spectrum | Kaldi,
        level_db: float | None = None,
        deltas: int = 0,
        cmvn: bool = False,
        stack: int = 1,
    ) -> None:
        super().__init__()
        if deltas < 0 or stack < 1:
            raise UserError(f"features: deltas {deltas} and stack {stack} need >= 0 and >= 1")
        self.signal, self.level_db, self.deltas = signal, level_db, deltas
        self.cmvn, self.stack = cmvn, stack
        # who asks for the rate of the frames reads it off the hop
        self.params = replace(signal.params, hop=signal.params.hop * stack)

    @property
    def bands(self) -> int:
        """Numbers per (stacked) frame."""
        return self.signal.bands * (1 + self.deltas) * self.stack

    def frames(self, samples: int) -> int:
        """Frames of a waveform of that many samples."""
        return self.signal.frames(samples) // self.stack

    @property
    def first_centre(self) -> float:
        """Centre of the first (stacked) frame, in frames."""
        return (self.signal.first_centre + (self.stack - 1) / 2) / self.stack

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(T, F) of a waveform with axes (S,)."""
        return self.frames(shape[0]), self.bands

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Frames of items with that many valid samples, at least 1 where there are any, else 0."""
        steps = torch.div(self.signal.out_lengths(lengths_P), self.stack, rounding_mode="floor")
        return steps.clamp(min=1) * (lengths_P > 0)

    def forward(self, wave_PS: Tensor, lengths_P: Tensor | None = None) -> Tensor:
        """(P, S) or (P, 1, S) in [-1, 1] to fp32 (P, 1, T, F), zeros behind the valid frames.

        Raises:
            UserError: several channels, or a waveform too short for one frame.
        """
        wave = zero_behind(mono(wave_PS).float(), lengths_P, axis=1)
        if self.frames(wave.shape[1]) < 1:
            raise UserError(
                f"a waveform of {wave.shape[1]} samples has no {self.stack} frames to stack; use a "
                "longer audio view"
            )
        if self.level_db is not None:
            wave = _levelled(wave, lengths_P, self.level_db)
        x_PTF = self.signal(wave, lengths_P)[:, 0]
        frames_P = None if lengths_P is None else self.signal.out_lengths(lengths_P)
        with torch.autocast(wave.device.type, enabled=False):
            x_PTF = _with_deltas(x_PTF, self.deltas, frames_P)
            if self.cmvn:
                x_PTF = _normalised(x_PTF, frames_P)
        x_PTF = _stacked(zero_behind(x_PTF, frames_P, axis=1), self.stack)
        kept = None if lengths_P is None else self.out_lengths(lengths_P)
        return zero_behind(x_PTF, kept, axis=1).unsqueeze(1)


def _levelled(wave_PS: Tensor, lengths_P: Tensor | None, level_db: float) -> Tensor:
    samples = wave_PS.shape[1] if lengths_P is None else lengths_P.clamp(min=1)[:, None]
    rms = (wave_PS.square().sum(dim=1, keepdim=True) / samples).sqrt()
    return wave_PS * (10 ** (level_db / 20) / (rms + 1e-10))


def _with_deltas(x_PTF: Tensor, order: int, frames_P: Tensor | None) -> Tensor:
    parts = [x_PTF]
    for _ in range(order):
        held = _hold_last(parts[-1], frames_P)
        deltas = torchaudio.functional.compute_deltas(held.transpose(1, 2))
        parts.append(deltas.transpose(1, 2))
    return torch.cat(parts, dim=2)


def _hold_last(x_PTF: Tensor, frames_P: Tensor | None) -> Tensor:
    """Repeats each item's last valid frame to the end, as its edge is repeated where it is full."""
    if frames_P is None:
        return x_PTF
    places = torch.arange(x_PTF.shape[1], device=x_PTF.device)
    index_PT = torch.minimum(places, (frames_P - 1).clamp(min=0)[:, None])
    return x_PTF.gather(1, index_PT[..., None].expand_as(x_PTF))


def _normalised(x_PTF: Tensor, frames_P: Tensor | None) -> Tensor:
    if frames_P is None:
        frames_P = torch.full((x_PTF.shape[0],), x_PTF.shape[1], device=x_PTF.device)
    count_P11 = frames_P[:, None, None]
    total = zero_behind(x_PTF, frames_P, axis=1).sum(dim=1, keepdim=True)
    centred = zero_behind(x_PTF - total / count_P11.clamp(min=1), frames_P, axis=1)
    variance = centred.square().sum(dim=1, keepdim=True) / (count_P11 - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-10)


def _stacked(x_PTF: Tensor, stack: int) -> Tensor:
    frames = x_PTF.shape[1] // stack
    return x_PTF[:, : frames * stack].reshape(x_PTF.shape[0], frames, -1)
