"""R16: sound and picture keep together, whichever decoder reads them.

Clips with flashes and clicks at known times, whose sound starts up to half a second before or after
the picture: flashes must be found within one frame, clicks within 5 ms.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from faults.report import Outcome, collect
from media_files import click_wave, flash_frames, write_media

from mmssl.data.backends import torchcodec_decoder
from mmssl.data.decode import ClipReader
from mmssl.data.samples import Record
from mmssl.types import UserError
from mmssl.views.plan import Need

FPS, SECONDS = 10, 2.5
EVENTS = (0.6, 1.1, 1.7)
FILES = (
    ("mp4", 16000, "aac"),
    ("mp4", 48000, "libopus"),
    ("matroska", 44100, "aac"),
    ("matroska", 16000, "flac"),
    ("webm", 48000, "libopus"),
)


def run(count: int, seed: int) -> list[Outcome]:
    """Read `count` clips with each decoder that is installed."""
    return collect("R16", _cases(count, seed))


def _cases(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    random_ = random.Random(seed)
    decoders = ["pyav", "decord"]
    try:
        torchcodec_decoder()
        decoders.append("torchcodec")
    except UserError:
        pass
    for k in range(count):
        container, rate, codec = FILES[k % len(FILES)]
        offset = random_.uniform(-0.5, 0.5)
        data = write_media(
            flash_frames(round(SECONDS * FPS), FPS, EVENTS),
            click_wave(SECONDS - offset, rate, [t - offset for t in EVENTS]),
            container=container,
            rate=rate,
            audio_codec=codec,
            video_at=max(0.0, -offset),
            audio_at=max(0.0, offset),
        )
        for decoder in decoders:
            yield f"sound starts elsewhere than the picture, {decoder}", _in_time(data, decoder)


def _in_time(data: bytes, decoder: str) -> bool:
    record = Record("k", "s", 0, frozenset({"audio", "video"}), (), {}, data, None)
    times = tuple(k / FPS for k in range(round(SECONDS * FPS)))
    with ClipReader(record, decoder=decoder) as reader:
        clip = reader.clip(Need(16000, 0.0, SECONDS, times))
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.frame_times_s is not None
    seen = clip.frame_times_s[clip.frames.float().mean((1, 2, 3)) > 128].tolist()
    loud = np.flatnonzero(clip.waveform[0].abs().numpy() > 0.2) / 16000
    heard = loud[np.diff(loud, prepend=-1.0) > 0.2]
    return (
        len(seen) == len(heard) == len(EVENTS)
        and bool(np.abs(np.subtract(seen, EVENTS)).max() <= 1 / FPS)
        and bool(np.abs(heard - EVENTS).max() <= 0.005)
    )
