"""What a synthetic clip sounds like, and how clips become files.

Letters in names: T frames, H rows, W columns, C channels, S samples. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from mmssl.files import whole_file

RATE = 16_000
Wave = NDArray[np.float64]

_ATTACK_S = 0.002
_SMALLEST, _LARGEST = 16.0, 36.0  # diameters (px) between which the pitch goes through an octave
_PITCH_RANGE = 2.2  # pitch of the smallest object relative to the largest
_NOISE_DB = -55.0
_HIT_LOUDNESS = 0.06  # root of the energy (full scale squared times seconds) of one hit
_HIT_PEAK = 0.65


# --- timbres: each makes one hit from a relative pitch (1 = largest object) and a generator


def _clock(seconds: float) -> Wave:
    return np.arange(int(seconds * RATE)) / RATE


def _sweep(frequency_S: Wave) -> Wave:
    """Phase (radians) of an instantaneous frequency (Hz)."""
    return np.asarray(2 * np.pi * np.cumsum(frequency_S) / RATE)


def _partials(t: Wave, parts: Sequence[tuple[float, float, float]]) -> Wave:
    """Sum of decaying sines; parts are (Hz, amplitude, decay per second); none above 7.6 kHz."""
    waves = [a * np.exp(-d * t) * np.sin(2 * np.pi * f * t) for f, a, d in parts if f < 7600]
    return np.asarray(np.sum(waves, axis=0))


def _beep(pitch: float, _: np.random.Generator) -> Wave:
    t = _clock(0.16)
    return np.asarray(np.sin(2 * np.pi * 440 * pitch * t))


def _buzz(pitch: float, _: np.random.Generator) -> Wave:
    t = _clock(0.24)
    parts = [(110 * pitch * k, 1 / k, 3.0) for k in range(1, 60, 2)]
    return _partials(t, parts) * (1 + 0.8 * np.sign(np.sin(2 * np.pi * 35 * t)))


def _chime(pitch: float, _: np.random.Generator) -> Wave:
    return _partials(_clock(0.3), [(1150 * pitch, 1.0, 9.0), (1150 * 2.756 * pitch, 0.6, 16.0)])


def _twang(pitch: float, _: np.random.Generator) -> Wave:
    parts = [(165 * pitch * k, k**-0.6, 5.0 + 1.2 * k * k) for k in range(1, 25)]
    return _partials(_clock(0.3), parts)


def _hiss(pitch: float, rng: np.random.Generator) -> Wave:
    t = _clock(0.13)
    spectrum = np.fft.rfft(rng.normal(size=len(t)))
    frequency = np.fft.rfftfreq(len(t), 1 / RATE)
    octaves = np.log2(np.maximum(frequency, 1.0) / (2300 * pitch))
    return np.asarray(np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.45) ** 2), len(t)))


def _chirp(pitch: float, _: np.random.Generator) -> Wave:
    t = _clock(0.18)
    return np.asarray(np.sin(_sweep(600 * pitch * 4 ** (t / 0.18))))


def _swoop(pitch: float, _: np.random.Generator) -> Wave:
    t = _clock(0.26)
    phase = _sweep(1500 * pitch * 8 ** (-t / 0.26))
    return np.asarray(sum(np.sin(k * phase) / k for k in (1, 2, 3)))


def _hum(pitch: float, _: np.random.Generator) -> Wave:
    t = _clock(0.3)
    phase = _sweep(210 * pitch * 2 ** (0.2 * np.sin(2 * np.pi * 14 * t)))
    return np.asarray(np.sin(phase) + 0.7 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase))


def _click(pitch: float, _: np.random.Generator) -> Wave:
    return _partials(_clock(0.08), [(800 * pitch, 1.0, 70.0), (1330 * pitch, 0.8, 90.0)])


def _clang(pitch: float, rng: np.random.Generator) -> Wave:
    ratios = (1.0, 1.47, 1.71, 2.13, 2.63, 3.19, 3.72, 4.41, 5.33, 6.27)
    t = _clock(0.3)
    body = _partials(t, [(520 * pitch * r, 1.0, 7.0 + r) for r in ratios])
    return body + rng.normal(size=len(t)) * np.exp(-120 * t)


TIMBRES: dict[str, Callable[[float, np.random.Generator], Wave]] = {
    "circle": _beep,
    "square": _buzz,
    "triangle": _chime,
    "diamond": _twang,
    "cross": _hiss,
    "star": _chirp,
    "ring": _hum,
    "crescent": _swoop,
    "arrow": _click,
    "heart": _clang,
}


def hit_sound(shape: str, diameter: float, rng: np.random.Generator) -> Wave:
    """Sound of one wall hit: timbre by shape, pitch by diameter (px), energy alike for all."""
    size = (_LARGEST - diameter) / (_LARGEST - _SMALLEST)
    wave_S = TIMBRES[shape](_PITCH_RANGE**size, rng)
    t = np.arange(len(wave_S)) / RATE
    left = (len(wave_S) - np.arange(len(wave_S))) / RATE
    wave_S = wave_S * np.minimum(t / _ATTACK_S, 1.0) * np.minimum(left / 0.02, 1.0)
    loudness = _HIT_LOUDNESS / np.sqrt(np.sum(wave_S**2) / RATE)
    return np.asarray(wave_S * min(loudness, _HIT_PEAK / np.abs(wave_S).max()))


def hits_track(
    shape: str, diameter: float, hits: Sequence[float], seconds: float, rng: np.random.Generator
) -> Wave:
    """Audio track (S,) at 16 kHz with one sound per hit, over a faint noise floor."""
    track_S = np.zeros(round(seconds * RATE))
    for hit in hits:
        begin = round(hit * RATE)
        sound = hit_sound(shape, diameter, rng)[: len(track_S) - begin]
        track_S[begin : begin + len(sound)] += sound
    track_S *= 10 ** (rng.uniform(-3, 3) / 20)
    track_S += rng.normal(0, 10 ** (_NOISE_DB / 20), len(track_S))
    return np.asarray(track_S * min(1.0, 0.95 / np.abs(track_S).max()))


# --- files


def write_clip(
    path: Path, frames_THWC: NDArray[np.uint8] | None, wave_S: Wave | None, fps: int
) -> None:
    """Write an mp4 (H.264, AAC) of which either part may be missing; the bytes repeat exactly.

    Args:
        path: Final name; the file appears there only when it is complete.
        frames_THWC: RGB frames, or None for a file without a video stream.
        wave_S: Mono audio at 16 kHz in [-1, 1], or None for a file without an audio stream.
        fps: Frames per second; frame k is shown from k / fps on.
    """
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with (
        whole_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options=options) as container,
    ):
        video = None if frames_THWC is None else _video_stream(container, frames_THWC, fps)
        audio = None if wave_S is None else _audio_stream(container)
        if video is not None and frames_THWC is not None:
            _write_video(container, video, frames_THWC)
        if audio is not None and wave_S is not None:
            _write_audio(container, audio, wave_S)


def _video_stream(
    container: av.container.OutputContainer, frames_THWC: NDArray[np.uint8], fps: int
) -> av.VideoStream:
    options = {
        "preset": "veryfast",
        "tune": "fastdecode",
        "crf": "20",
        "g": "20",
        "bf": "0",
        "threads": "1",  # the encoder's bytes depend on the number of threads
        "x264-params": "cpu-independent=1",  # else equal frames now and then give other bytes
        "flags": "+bitexact",
    }
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.height, stream.width = frames_THWC.shape[1:3]
    stream.pix_fmt = "yuv420p"
    return stream


def _audio_stream(container: av.container.OutputContainer) -> av.AudioStream:
    # the fast coder takes a fifth of the default's time and keeps transients better (worst clip
    # 25 dB against 16 dB); Opus, always at 48 kHz, costs four times as much to decode
    options = {"b": "64k", "aac_coder": "fast", "flags": "+bitexact", "threads": "1"}
    return container.add_stream("aac", rate=RATE, options=options, layout="mono")


def _write_video(
    container: av.container.OutputContainer, stream: av.VideoStream, frames: NDArray[np.uint8]
) -> None:
    convert = VideoReformatter()  # one for all frames: making one costs more than using it
    for k, picture in enumerate(frames):
        rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = convert.reformat(rgb, format="yuv420p", threads=1)
        frame.pts = k
        frame.time_base = 1 / Fraction(stream.average_rate or 1)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _write_audio(
    container: av.container.OutputContainer, stream: av.AudioStream, wave_S: Wave
) -> None:
    samples = np.clip(wave_S, -1, 1).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    container.mux(stream.encode(frame))  # cut into codec frames by the encoder
    container.mux(stream.encode(None))


def read_audio(path: Path) -> Wave:
    """Samples (S,) of the first audio stream, mono at 16 kHz.

    Raises:
        OSError, ValueError: If the file cannot be read or holds no audio.
    """
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError("no audio stream")
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        parts = [
            out.to_ndarray()[0]
            for frame in (*container.decode(container.streams.audio[0]), None)
            for out in resampler.resample(frame)
        ]
    if not parts:
        raise ValueError("no audio samples")
    return np.concatenate(parts).astype(np.float64)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """RGBA picture (H, W, 4).

    Raises:
        OSError, ValueError: If the file cannot be read or holds no picture.
    """
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            return frame.to_ndarray(format="rgba").astype(np.uint8)
    raise ValueError("no picture")
