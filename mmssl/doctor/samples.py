"""A one-second test film whose every frame and tone is known.

T frames, H height, W width, S samples.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

FRAMES, FPS, SIDE = 10, 10, 64
AUDIO_HZ, TONE_HZ = 16_000, 440.0
LEVEL_TOLERANCE = 8.0  # of 255; H.264 at this rate stays within 3


def levels() -> np.ndarray:
    """(T,) grey level of every frame."""
    return 20.0 + 20.0 * np.arange(FRAMES)


def write_film(path: Path) -> None:
    """Write the test film (H.264 and AAC in mp4) with PyAV."""
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"threads": "1"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        audio = out.add_stream("aac", rate=AUDIO_HZ, layout="mono")
        for level in levels():
            grey_HW3 = np.full((SIDE, SIDE, 3), level, dtype=np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(grey_HW3, format="rgb24")))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(_tone()[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = AUDIO_HZ, 0, Fraction(1, AUDIO_HZ)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))


def _tone() -> np.ndarray:
    """(S,) float32 sine of one second."""
    return (0.5 * np.sin(2 * np.pi * TONE_HZ * np.arange(AUDIO_HZ) / AUDIO_HZ)).astype(np.float32)


def frames_problem(frames_THWC: np.ndarray) -> str:
    """Empty if these are the film's frames, else what is wrong."""
    if frames_THWC.shape[0] != FRAMES:
        return f"read {frames_THWC.shape[0]} of {FRAMES} frames"
    error = np.abs(frames_THWC.reshape(FRAMES, -1).mean(axis=1) - levels()).max()
    return f"grey levels are off by {error:.1f} of 255" if error > LEVEL_TOLERANCE else ""


def tone_problem(wave_S: np.ndarray) -> str:
    """Empty if this is the film's tone, else what is wrong."""
    if abs(wave_S.size - AUDIO_HZ) > 0.2 * AUDIO_HZ:
        return f"read {wave_S.size} of {AUDIO_HZ} audio samples"
    peak = float(np.abs(np.fft.rfft(wave_S)).argmax()) * AUDIO_HZ / wave_S.size
    return (
        f"the tone is at {peak:.0f} Hz instead of {TONE_HZ:.0f}" if abs(peak - TONE_HZ) > 5 else ""
    )
