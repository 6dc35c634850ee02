"""How far a decoder itself moves sound against picture: flashes with tones, read back."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from mmssl.data.decode import ClipReader
from mmssl.data.samples import Record
from mmssl.eval.items import Metrics
from mmssl.views.plan import Need

FPS, HZ, SECONDS = 25, 48_000, 3.0
CLAPS_S = (0.52, 1.0, 1.48, 2.2)
_TONE_S, _SIDE = 0.1, 64


def alignment_error(decoder: str) -> Metrics:
    """Time of each tone minus that of its flash as `decoder` delivers them: mean and greatest, ms.

    The film is H.264 and AAC in mp4; a frame lasts 40 ms, a sample 0.02 ms.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clapper.mp4"
        _write(path)
        data = path.read_bytes()
    record = Record("clapper", "", 0, frozenset({"audio", "video"}), (), {}, data, None)
    times = tuple(k / FPS for k in range(round(FPS * SECONDS)))
    with ClipReader(record, decoder=decoder) as reader:
        clip = reader.clip(Need(HZ, 0.0, reader.duration_s, times))
    assert clip.frames is not None  # the film has both streams
    assert clip.frame_times_s is not None
    assert clip.waveform is not None
    bright = clip.frames.float().mean((1, 2, 3)).numpy() > 127
    flashes_s = clip.frame_times_s.numpy()[bright & ~np.roll(bright, 1)]
    loud = np.abs(clip.waveform[0].numpy()) > 0.25
    onset = loud & ~np.array([loud[max(0, i - 2000) : i].any() for i in range(len(loud))])
    tones_s = clip.audio_start_s + np.flatnonzero(onset) / HZ
    if len(flashes_s) != len(CLAPS_S) or len(tones_s) != len(CLAPS_S):
        return {"mean_ms": None, "max_ms": None, "claps": 0}
    error_ms = 1000 * (tones_s - flashes_s)
    return {
        "mean_ms": float(error_ms.mean()),
        "max_ms": float(np.abs(error_ms).max()),
        "claps": len(CLAPS_S),
    }


def _write(path: Path, late_s: float = 0.0) -> None:
    """The film; its sound may be late."""
    import av

    frames = np.zeros((round(FPS * SECONDS), _SIDE, _SIDE, 3), dtype=np.uint8)
    wave = np.zeros((1, round(HZ * SECONDS)), dtype=np.float32)
    tone = 0.5 * np.cos(2 * np.pi * 1000 * np.arange(round(_TONE_S * HZ)) / HZ)
    for time_s in CLAPS_S:
        frames[round(time_s * FPS)] = 255
        first = round((time_s + late_s) * HZ)
        wave[0, first : first + len(tone)] = tone
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"threads": "1"})
        video.width = video.height = _SIDE
        video.pix_fmt = "yuv420p"
        audio = out.add_stream("aac", rate=HZ, layout="mono")
        for picture in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = HZ, 0, Fraction(1, HZ)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
