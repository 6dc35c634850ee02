"""What an audit hears in a stream of decoded audio: loudness, silence, clipping, onsets, content.

Letters in shapes: C channels, S samples, F mel bands, T steps of 10 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from data_tools.near import code_of
from mmssl.data.integrity import DamagedSampleError

Floats = NDArray[np.float32]

STEPS_HZ = 100
_HZ = 8000  # what onsets and content are taken from: telephone band, which every codec keeps
_FFT = 256
_BANDS, _RANGE_DB, _FAINT_DB = 32, 60.0, 6.0
_GATE_LUFS = -70.0  # the filter's answer where no block passes the gate of BS.1770
_ZERO = 2.0**-16  # rounds to zero in 16 bits
_FULL = 0.999


class Sounds:
    """Takes in the frames of one stream; memory grows with the mono signal at 8 kHz only."""

    def __init__(self) -> None:
        """Wait for the first frame, which says rate and channels."""
        self._native: AudioResampler | None = None
        self._mono: AudioResampler | None = None
        self._kind: tuple[str, str, int] | None = None
        self._loudness: _Loudness | None = None
        self._wave: list[Floats] = []
        self._start_s, self._layout, self._rate = math.nan, "", 0
        self._samples = self._silent = self._clipped = self._values = 0
        self._peak = 0.0

    def add(self, frame: Any, time_s: float) -> None:
        """Take in a decoded frame that begins at an absolute time."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._loudness is None:
            self._start_s = time_s
            _, self._layout, self._rate = kind
            self._loudness = _Loudness(self._layout, self._rate)
        if kind != self._kind:  # streams may change; what follows is measured as the beginning is
            self._pass(None)
            self._kind = kind
            self._native = AudioResampler("fltp", self._layout, self._rate)
            self._mono = AudioResampler("flt", "mono", _HZ)
        frame.pts = None  # gaps of the time stamps are no silence
        self._pass(frame)

    def _pass(self, frame: Any) -> None:
        """Measure a frame; None at the end of a stretch of one kind."""
        if self._native is None or self._mono is None:
            return
        for part in self._native.resample(frame):
            self._count(part)
        self._wave += [f.to_ndarray()[0] for f in self._mono.resample(frame)]

    def _count(self, frame: Any) -> None:
        assert self._loudness is not None
        self._loudness.add(frame)
        size_CS = np.abs(frame.to_ndarray())
        if not np.isfinite(size_CS).all():
            raise DamagedSampleError("decode", "the sound has samples that are not finite")
        full_CS = size_CS >= _FULL
        self._samples += size_CS.shape[1]
        self._values += size_CS.size
        self._silent += int((size_CS < _ZERO).all(0).sum())
        self._clipped += int((full_CS[:, 1:] & full_CS[:, :-1]).sum())
        self._peak = max(self._peak, float(size_CS.max(initial=0.0)))

    @property
    def heard(self) -> bool:
        """Whether there was anything."""
        return self._samples > 0

    def facts(self) -> tuple[dict[str, Any], tuple[Floats, float] | None]:
        """Measurements, and how much the spectrum rises at every step with the stream's start.

        audio_s: length; loudness_lufs: integrated, ITU-R BS.1770-4 (None where no block of 400 ms
        reaches -70 LUFS); peak_dbfs: of samples; silence_share: samples that are zero in 16 bits;
        clipped_share: those at full scale that follow one at full scale; audio_code: see
        `near.code_of`.
        """
        if self._loudness is None:
            return {}, None
        self._pass(None)
        found: dict[str, Any] = {
            "audio_s": self._samples / self._rate,
            "loudness_lufs": self._loudness.close(),
            "peak_dbfs": 20 * math.log10(self._peak) if self._peak else None,
            "silence_share": self._silent / self._samples,
            "clipped_share": self._clipped / self._values,
        }
        level_FT = _levels(np.concatenate([np.zeros(0, np.float32), *self._wave]))
        if level_FT is None:
            return found, (np.zeros(1, np.float32), self._start_s)
        rise_T = np.maximum(np.diff(level_FT, axis=1), 0).sum(0)
        found["audio_code"] = sound_code(level_FT)
        return found, (np.append(np.float32(0), rise_T), self._start_s)


def sound_code(level_FT: Floats) -> str:
    """Code of a log-mel spectrogram stretched to 64 steps: gain changes its constant part only.

    The padding of codecs is cut off. The mean spectrum counts half, since many sounds share it.
    """
    loud = np.flatnonzero(level_FT.max(0) > _FAINT_DB)
    inner = torch.from_numpy(level_FT[:, loud[0] : loud[-1] + 1])
    pooled_FT = torch.nn.functional.adaptive_avg_pool1d(inner, 64).numpy()
    return code_of((pooled_FT - 0.5 * pooled_FT.mean(1, keepdims=True))[None], (16, 32))


def _levels(wave_S: Floats) -> Floats | None:
    """(F, T) decibels above the clip's maximum less 60 dB; None without sound or under 16 ms."""
    if len(wave_S) <= _FFT // 2:  # too short for the padding of the transform
        return None
    power_FT = _mel()(torch.from_numpy(wave_S)).numpy()
    top = float(power_FT.max(initial=0.0))
    if top < _ZERO**2:
        return None
    level_FT = 10 * np.log10(np.maximum(power_FT / top, 10 ** (-_RANGE_DB / 10)))
    return np.asarray(level_FT + _RANGE_DB, np.float32)


@lru_cache(maxsize=1)
def _mel() -> Any:
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(_HZ, n_fft=_FFT, hop_length=_HZ // STEPS_HZ, n_mels=_BANDS)


class _Loudness:
    """FFmpeg's meter."""

    def __init__(self, layout: str, rate: int) -> None:
        self._graph = av.filter.Graph()
        self._source = self._graph.add_abuffer(
            sample_rate=rate, format="fltp", layout=layout, time_base=Fraction(1, rate)
        )
        meter = self._graph.add("ebur128", "metadata=1:framelog=quiet")
        self._sink = self._graph.add("abuffersink")
        self._source.link_to(meter)
        meter.link_to(self._sink)
        self._graph.configure()
        self._value: str | None = None

    def add(self, frame: Any) -> None:
        """Take in a frame, None at the end."""
        self._source.push(frame)
        for measured in self._pulled():
            self._value = measured.metadata.get("lavfi.r128.I", self._value)

    def _pulled(self) -> Iterator[Any]:
        while True:
            try:
                yield self._sink.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    def close(self) -> float | None:
        """LUFS."""
        self.add(None)
        value = _GATE_LUFS if self._value is None else float(self._value)
        return value if value > _GATE_LUFS else None
