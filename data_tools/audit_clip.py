"""The measurements of one clip; runs in the decoding child, since the media is not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from data_tools.audit_pictures import Pictures
from data_tools.audit_sound import Sounds
from mmssl.data import media
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits, Track
from mmssl.types import Sample

_PREROLL_S = 0.25  # packets an audio decoder needs before its output is right


def measure(sample: Sample) -> dict[str, Any]:
    """What the media of a clip is like.

    sample: fields `video` (a container with pictures, with the sound unless there is `sound`) and
    `sound`, both optional; `job`, JSON with `has` (modalities, or null for all) and `start` and
    `end` (seconds from the first frame; null for the end of the file).

    Raises:
        DamagedSampleError: see `media.opened`, `media.check_limits` and `media.read_tracks`;
            `decode`, `missing` and `cut`.
    """
    job = json.loads(sample.fields["job"])
    found: dict[str, Any] = {"has": []}
    offers = {"video": {"video"} if "sound" in sample.fields else {"video", "audio"}}
    offers["sound"] = {"audio"}
    for name, wanted in offers.items():
        if name in sample.fields:
            wanted = wanted if job["has"] is None else wanted & set(job["has"])
            found["has"] += _file(sample.fields[name], wanted, job, found)
    lacking = set(job["has"] or ()) - {*found["has"], "text"}
    if lacking:
        raise DamagedSampleError("missing", f"{sample.key}: lacks {sorted(lacking)}")
    return found


def _file(data: bytes, wanted: set[str], job: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Adds what a file holds to `found`; returns its modalities."""
    limits = Limits()
    with media.opened(data) as container:
        header = media.read_header(container)
        media.check_limits(header, limits)
        tracks = media.read_tracks(container, "video" in wanted, "audio" in wanted, limits)
        if not tracks:
            return []
        clock = tracks.get("video") or tracks["audio"]
        start_s = clock.start_s + job["start"]
        end_s = clock.end_s if job["end"] is None else clock.start_s + job["end"]
        if job["start"] >= clock.end_s - clock.start_s:
            raise DamagedSampleError("cut", f"start {job['start']:g} s lies after the end")
        found.setdefault("container", header.format)
        found.setdefault("duration_s", min(end_s, clock.end_s) - start_s)
        whole = job["start"] == 0 and job["end"] is None
        span = (-math.inf, math.inf) if whole else (start_s, end_s)
        pictures = _seen(tracks["video"], span, header, found) if "video" in tracks else None
        rise = _heard(tracks["audio"], span, header, found) if "audio" in tracks else None
        if pictures is not None and rise is not None:
            if whole:  # the decoder knows what of the first packet is padding, the container not
                found["start_gap_s"] = rise[1] - pictures.start_s
            found |= pictures.offset(*rise)
    return sorted(tracks)


def _seen(
    track: Track, span: tuple[float, float], header: media.Header, found: dict[str, Any]
) -> Pictures:
    shown = [k for k, (pts, _) in enumerate(track.shown) if _inside(pts * track.tick_s, span)]
    pictures = Pictures(len(shown))
    seen = False
    for frame, time_s in _frames(track, span, 0.0):
        pictures.add(frame, time_s)
        seen = True
    if not seen:
        raise DamagedSampleError("decode", "the video stream decodes to nothing")
    found |= {
        "video_codec": header.video_codec,
        "width": header.width,
        "height": header.height,
        "fps": header.fps,
        "pix_fmt": header.pix_fmt,
        **pictures.facts(),
    }
    return pictures


def _heard(
    track: Track, span: tuple[float, float], header: media.Header, found: dict[str, Any]
) -> Any:
    sounds = Sounds()
    for frame, time_s in _frames(track, span, _PREROLL_S):
        sounds.add(frame, time_s)
    if not sounds.heard:
        raise DamagedSampleError("decode", "the audio stream decodes to nothing")
    facts, rise = sounds.facts()
    named = {"audio_codec": header.audio_codec, "rate": header.rate, "channels": header.channels}
    found |= named | facts
    return rise


def _inside(time_s: float, span: tuple[float, float]) -> bool:
    return span[0] - 1e-3 <= time_s < span[1] - 1e-3


def _frames(
    track: Track, span: tuple[float, float], preroll_s: float
) -> Iterator[tuple[Any, float]]:
    """Decoded frames that begin inside a stretch of absolute time, and when."""
    packets, context = track.packets, track.stream.codec_context
    wanted = [i for pts, i in track.shown if _inside(pts * track.tick_s, span)]
    if not wanted:
        return
    first, last = min(wanted), max(wanted)
    start_s = min(track.time_s(packets[i]) for i in wanted) - preroll_s
    while first > 0 and not (
        packets[first].is_keyframe and track.time_s(packets[first]) <= start_s
    ):
        first -= 1
    for packet in [*packets[first : last + 1], None]:
        for frame in context.decode(packet):
            if frame.pts is not None and _inside(frame.pts * track.tick_s, span):
                yield frame, frame.pts * track.tick_s
    context.flush_buffers()
