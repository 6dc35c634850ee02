"""Pitch, voicing, energy and zero crossings of speech.

P items, S samples, T frames, W samples of a window, L lags.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.frontends.spectra import Spectrum, SpectrumParams

_VOICED = 0.5  # periodicity above which a frame is voiced
_EQUAL = 0.9  # share of the best peak at which a shorter lag is preferred to its multiples
_QUIET = 1e-8  # mean square of a silence, about -80 dB


class Prosody(Spectrum):
    """Four numbers of each frame, which lies around sample t * hop (PASE, 2019).

    ln of the fundamental frequency in Hz, interpolated over unvoiced frames; 1 where voiced, else
    0; ln of the mean square; zero crossings per sample. The fundamental is the first high peak of
    the normalised cross-correlation of a window with what follows it (Talkin 1995), between f_min
    and f_max of the parameters; an item without voice has the middle of their logarithms.
    """

    def __init__(self, sample_rate: int, win: int, hop: int, f_min: float, f_max: float) -> None:
        options = {"sample_rate": sample_rate, "win": win, "hop": hop, "n_fft": win}
        super().__init__(SpectrumParams(**options, f_min=f_min, f_max=f_max, log="none"))  # type: ignore[arg-type]

    @property
    def bands(self) -> int:
        """Numbers of one frame."""
        return 4

    def _transform(self) -> nn.Module:
        return _Tracker(self.params)


class _Tracker(nn.Module):
    """(P, S) to (P, 4, T)."""

    def __init__(self, params: SpectrumParams) -> None:
        super().__init__()
        self.rate, self.win, self.hop = params.sample_rate, params.win, params.hop
        self.shortest = int(self.rate / params.top)
        self.longest = math.ceil(self.rate / params.f_min)
        self.middle = math.log(math.sqrt(params.f_min * params.top))

    def forward(self, wave_PS: Tensor) -> Tensor:
        hz_PT, periodic_PT = self._pitch(wave_PS)
        voiced_PT = periodic_PT > _VOICED
        crossed_PS = F.pad((wave_PS[:, 1:] * wave_PS[:, :-1] < 0).to(wave_PS), (1, 0))
        energy_PT = self._frames(wave_PS, self.win).square().mean(-1)
        columns = [
            interpolated(hz_PT.log(), voiced_PT, self.middle),
            voiced_PT.to(wave_PS),
            (energy_PT + _QUIET).log(),
            self._frames(crossed_PS, self.win).mean(-1),
        ]
        return torch.stack(columns, 1)

    def _frames(self, wave_PS: Tensor, size: int) -> Tensor:
        """(P, T, size) around every `hop`-th sample."""
        padded = F.pad(wave_PS, (size // 2, size - size // 2))
        return padded.unfold(1, size, self.hop)[:, : 1 + wave_PS.shape[1] // self.hop]

    def _pitch(self, wave_PS: Tensor) -> tuple[Tensor, Tensor]:
        """(P, T) frequency in Hz and periodicity in [-1, 1] of the peak that was chosen."""
        frames = self._frames(wave_PS, self.win + self.longest + 1)
        frames = frames - frames.mean(-1, keepdim=True)
        scores_PTL = _correlation(frames, self.win)[..., self.shortest - 1 :]
        left, here, right = scores_PTL[..., :-2], scores_PTL[..., 1:-1], scores_PTL[..., 2:]
        peaks = (here > left) & (here >= right)
        best = here.masked_fill(~peaks, -1.0).amax(-1, keepdim=True)
        first = (peaks & (here >= _EQUAL * best)).to(torch.uint8).argmax(-1, keepdim=True)
        a, b, c = (x.gather(-1, first)[..., 0] for x in (left, here, right))
        # the top of the parabola through the peak and its neighbours
        between = 0.5 * (a - c) / (a - 2 * b + c).clamp(max=-1e-6)
        lag_PT = first[..., 0] + self.shortest + between.clamp(-0.5, 0.5)
        return self.rate / lag_PT, best[..., 0]


def _correlation(frames_PTW: Tensor, win: int) -> Tensor:
    """(P, T, L) correlation of the first `win` samples with as many that begin L later."""
    size = frames_PTW.shape[-1]
    fast = 1 << (size - 1).bit_length()
    whole, head = (torch.fft.rfft(x, fast) for x in (frames_PTW, frames_PTW[..., :win]))
    cross = torch.fft.irfft(whole * head.conj(), fast)[..., : size - win + 1]
    square = F.pad(frames_PTW.square().cumsum(-1), (1, 0))
    energy = square[..., win:] - square[..., : size - win + 1]
    quiet = _QUIET * win
    scores: Tensor = cross / ((energy[..., :1] + quiet) * (energy + quiet).clamp(min=quiet)).sqrt()
    return scores


def interpolated(values_PT: Tensor, known_PT: Tensor, otherwise: float) -> Tensor:
    """Values with those that are not known on lines between their known neighbours.

    Before the first and behind the last they stay level; `otherwise` where none is known.
    """
    steps = known_PT.shape[1]
    place_PT = torch.arange(steps, device=known_PT.device).expand(known_PT.shape)
    before = torch.where(known_PT, place_PT, -1).cummax(1).values
    after = torch.where(known_PT, place_PT, steps).flip(1).cummin(1).values.flip(1)
    before, after = before.where(before >= 0, after), after.where(after < steps, before)
    a, b = (x.clamp(0, steps - 1) for x in (before, after))
    share = (place_PT - a) / (b - a).clamp(min=1)
    lines = values_PT.gather(1, a).lerp(values_PT.gather(1, b), share.to(values_PT))
    return torch.where(known_PT.any(1, keepdim=True), lines, otherwise)
