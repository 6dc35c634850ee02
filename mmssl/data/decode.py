"""Decodes the stretch of a sample that its views need, everything on one clock.

Zero is the time of the first video frame (or of the first audio sample where there is no video).
Audio is placed by its own time stamps, so start offsets, encoder delay and gaps are honoured.

Letters in shapes: C channels, S samples, T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.data import media
from mmssl.data.backends import BACKENDS, Picked, choose
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits, Track
from mmssl.data.samples import Record
from mmssl.types import Clip
from mmssl.views.clip import nearest
from mmssl.views.plan import Need

# Audio decoders need some packets before their output is right (overlapping windows, Opus 80 ms).
_PREROLL_S = 0.25
# Time stamps of Matroska and WebM are rounded to milliseconds: smaller jumps are no gaps.
_JITTER_S = 0.004
# Context for the resampler, a whole number of samples at every usual rate.
_MARGIN_S = 0.04


class ClipReader:
    """An open sample: header and timeline first, then any number of decoding passes.

    Attributes: `has` (modalities that are really there), `duration_s`, `frame_times_s`.
    """

    def __init__(
        self,
        record: Record,
        limits: Limits = media.DEFAULT_LIMITS,
        decoder: str = "auto",
    ) -> None:
        """Open the media of a record.

        Raises:
            DamagedSampleError: see `media.opened`, `media.check_limits` and `media.read_tracks`;
                `missing` where the json promises a modality that the file lacks.
        """
        self.record = record
        self._decoder = decoder
        self._stack = ExitStack()
        self._video: Track | None = None
        self._audio: Track | None = None
        self._header: media.Header | None = None
        try:
            self._open(limits)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, limits: Limits) -> None:
        record, has = self.record, self.record.has
        if record.video is not None and has & {"audio", "video"}:
            wants_audio = "audio" in has and record.sound is None
            tracks, self._header = self._load(record.video, "video" in has, wants_audio, limits)
            self._video, self._audio = tracks.get("video"), tracks.get("audio")
        if record.sound is not None and "audio" in has:
            tracks, _ = self._load(record.sound, False, True, limits)
            self._audio = tracks.get("audio")
        self.has = self._present()
        self._zero_s, self._sound_zero_s = self._zeros()
        self.frame_times_s = self._frame_times()
        self.duration_s = self._duration()

    def _load(
        self, data: bytes, video: bool, audio: bool, limits: Limits
    ) -> tuple[dict[str, Track], media.Header]:
        container = self._stack.enter_context(media.opened(data))
        header = media.read_header(container)
        media.check_limits(header, limits)
        return media.read_tracks(container, video, audio, limits), header

    def _present(self) -> frozenset[str]:
        found = {"text"} if self.record.texts else set()
        found |= {"video"} if self._video else set()
        found |= {"audio"} if self._audio else set()
        lacking = self.record.has - found
        if lacking:
            raise DamagedSampleError(
                "missing",
                f"{self.record.key}: the json promises {sorted(lacking)}, the file lacks it",
            )
        return self.record.has

    def _zeros(self) -> tuple[float, float]:
        """Absolute time of the clip's zero in the video's and in the audio's container."""
        own_clock = self._video is None or self.record.sound is not None
        sound = math.nan
        if self._audio is not None and own_clock:
            sound = _first_sample_s(self._audio)
        if self._video is None:
            return sound, sound
        return self._video.start_s, sound if own_clock else self._video.start_s

    def _frame_times(self) -> list[float]:
        if self._video is None:
            return []
        return [pts * self._video.tick_s - self._zero_s for pts, _ in self._video.shown]

    def _duration(self) -> float:
        if self._video is not None:
            return self._video.end_s - self._zero_s
        if self._audio is not None:
            return self._audio.end_s - self._sound_zero_s
        return 0.0

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *exc: Any) -> bool | None:
        return self._stack.__exit__(*exc)

    def clip(self, need: Need | None = None) -> Clip:
        """Decode what `need` names (nothing if None).

        Raises:
            DamagedSampleError: the stream cannot be decoded (`decode`).
        """
        record = self.record
        clip = Clip(
            key=record.key,
            source=record.source,
            index=record.index,
            duration_s=self.duration_s,
            captions=list(record.captions),
            meta=record.meta,
            transcript=record.transcript,
        )
        if need is not None and need.audio_hz and self._audio is not None:
            clip.audio_hz, clip.audio_start_s = need.audio_hz, need.audio_start_s
            clip.waveform = self._waveform(self._audio, need)
        if need is not None and need.frame_times_s and self._video is not None:
            clip.frames, clip.frame_times_s = self._frames(need)
        return clip

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the stored frames in pixels; zeros without video."""
        return (0, 0) if self._header is None else (self._header.width, self._header.height)

    def _frames(self, need: Need) -> tuple[Tensor, Tensor]:
        assert self._video is not None
        assert self._header is not None
        assert self.record.video is not None
        times = (self.frame_times_s, need.frame_times_s)
        shown, wanted = (torch.tensor(t, dtype=torch.float64) for t in times)
        order = sorted(set(nearest(shown, wanted).tolist()))
        name = choose(self._decoder, self._header, self._video, need.short_side)
        job = Picked(self.record.video, self._header, self._video, order, need.short_side)
        frames_THWC, pts_T = BACKENDS[name](job)
        times_T = [pts * self._video.tick_s - self._zero_s for pts in pts_T]
        return torch.from_numpy(frames_THWC), torch.tensor(times_T, dtype=torch.float64)

    def _waveform(self, track: Track, need: Need) -> Tensor:
        start, end = (t + self._sound_zero_s for t in (need.audio_start_s, need.audio_end_s))
        length = round((need.audio_end_s - need.audio_start_s) * need.audio_hz)
        rate = track.stream.codec_context.sample_rate
        if rate == need.audio_hz:
            return torch.from_numpy(_place(track, start, length, rate))[None]
        margin = round(_MARGIN_S * need.audio_hz)
        wide = _place(
            track, start - _MARGIN_S, math.ceil((end - start + 2 * _MARGIN_S) * rate), rate
        )
        out_S = resampler(rate, need.audio_hz)(torch.from_numpy(wide))[margin : margin + length]
        return torch.nn.functional.pad(out_S, (0, length - len(out_S)))[None]


@lru_cache(maxsize=8)
def resampler(rate: int, hz: int) -> Any:
    """Windowed-sinc resampler; it has no delay."""
    from torchaudio.transforms import Resample

    return Resample(rate, hz)


def _first_sample_s(track: Track) -> float:
    """Absolute time of the first sample: only the decoder knows how much priming it drops."""
    for frame in _audio_frames(track, -math.inf, math.inf):
        track.stream.codec_context.flush_buffers()
        return float(frame.pts * track.tick_s)
    raise DamagedSampleError("decode", "the audio stream decodes to nothing")


def _place(track: Track, start_s: float, length: int, rate: int) -> NDArray[np.float32]:
    """(S,) mono samples from absolute time `start_s`, silence where the stream has none."""
    out_S = np.zeros(length, dtype=np.float32)
    expected = -math.inf
    for frame in _audio_frames(track, start_s, start_s + length / rate):
        stamp = (frame.pts * track.tick_s - start_s) * rate
        first = round(expected if abs(stamp - expected) < _JITTER_S * rate else stamp)
        wave_S = _mono(frame)
        expected = first + len(wave_S)
        low, high = max(first, 0), min(expected, length)
        if high > low:
            out_S[low:high] = wave_S[low - first : high - first]
    return out_S


def _audio_frames(track: Track, start_s: float, end_s: float) -> Iterator[Any]:
    """Decoded frames that overlap the stretch, and some around it."""
    context = track.stream.codec_context
    from_start = start_s - track.start_s < 1.0
    sent = False
    for packet in track.packets:
        time = track.time_s(packet)
        if time >= end_s:
            break
        if from_start or time + _PREROLL_S >= start_s:
            sent = True
            yield from packet.decode()
    if sent:
        yield from context.decode(None)
        context.flush_buffers()


def _mono(frame: Any) -> NDArray[np.float32]:
    """(S,) mean of the channels, full scale 1."""
    if frame.format.name == "fltp" and len(frame.planes) == 1:  # the usual case, without a copy
        return np.frombuffer(frame.planes[0], np.float32)[: frame.samples]
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if samples.dtype.kind == "f":
        scaled = samples
    elif samples.dtype == np.uint8:
        scaled = (samples.astype(np.float32) - 128) / 128
    else:
        scaled = samples / np.float32(1 << (8 * samples.dtype.itemsize - 1))
    mono = scaled[0] if len(scaled) == 1 else scaled.mean(axis=0)
    return np.asarray(mono, dtype=np.float32)
