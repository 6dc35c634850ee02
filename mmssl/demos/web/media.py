"""Media as a browser plays them, and the checks of what is uploaded.

Letters in shapes: S samples.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from mmssl.data import media
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Header, Limits
from mmssl.data.samples import Record
from mmssl.demos import film
from mmssl.demos.localize import opened
from mmssl.embed.media import LIMITS
from mmssl.types import UserError
from mmssl.views.plan import Need

_WIDTH, _HZ = 640, 44_100  # of what is encoded again: largest side, sampling rate
# what every current browser decodes
_PICTURES, _SOUNDS = {"h264", "vp8", "vp9", "av1"}, {"aac", "mp3", "opus", "vorbis", ""}
_FILMS = {"mov,mp4,m4a,3gp,3g2,mj2": ".mp4", "matroska,webm": ".webm"}
_RECORDINGS = {"mov,mp4,m4a,3gp,3g2,mj2": ".m4a", "matroska,webm": ".webm"}
_PIPE = "_pipe"  # ends what FFmpeg calls the format of a picture

Kind = Literal["video", "audio", "img"]  # as HTML calls them


class Playable(NamedTuple):
    """A file for a browser; its ending tells what it is."""

    data: bytes
    ending: str
    kind: Kind


def checked(path: str, wanted: Collection[str], max_seconds: float) -> bytes:
    """The bytes of an upload that has what is wanted of it ("audio", "video").

    Raises:
        UserError: it is no such file, or too long.
    """
    name, data = Path(path).name, Path(path).read_bytes()
    limits = Limits(max_seconds=max_seconds)
    try:
        header = media.probe(data, limits)
        have = {"video": header.video_streams, "audio": header.audio_streams}
        lacking = [modality for modality in wanted if not have[modality]]
        if lacking:
            told = {"audio": "sound", "video": "pictures"}
            raise UserError(f"{name}: has no {' and no '.join(told[m] for m in lacking)}")
        # headers may lie about the length: the packets count
        record = Record(name, name, 0, frozenset(wanted), (), {}, video=data, sound=None)
        with ClipReader(record, limits):
            return data
    except DamagedSampleError as error:
        raise UserError(f"{name}: cannot be used: {error}") from error


def playable(record: Record) -> Playable | None:
    """The media of a record, as they are where a browser can play them; None without any.

    Raises:
        UserError: they cannot be decoded.
    """
    data = record.video if record.video is not None else record.sound
    if data is None:
        return None
    try:
        header = media.probe(data, LIMITS)
        if not header.video_streams or "video" not in record.has:
            data = data if record.sound is None else record.sound
            kind = media.probe(data, LIMITS).format
            return Playable(data, _RECORDINGS.get(kind, f".{kind}"), "audio")
        if header.format.endswith(_PIPE):
            return Playable(data, f".{header.format.removesuffix(_PIPE)}", "img")
        if record.sound is None and _plays(header):
            return Playable(data, _FILMS[header.format], "video")
        return Playable(dubbed(data, record.sound), ".mp4", "video")
    except DamagedSampleError as error:
        raise UserError(f"{record.key}: cannot be decoded ({error})") from error


def _plays(header: Header) -> bool:
    return (
        header.format in _FILMS
        and header.video_codec in _PICTURES
        and header.pix_fmt == "yuv420p"
        and header.audio_codec in _SOUNDS
    )


def has_sound(data: bytes) -> bool:
    """Whether a readable file has a stream of sound."""
    return media.probe(data, LIMITS).audio_streams > 0


def is_still(data: bytes) -> bool:
    """Whether a readable file is a picture."""
    return media.probe(data, LIMITS).format.endswith(_PIPE)


def dubbed(video: bytes, sound: bytes | None) -> bytes:
    """An mp4 file of a video, small enough for a page, with its own or another file's sound.

    The clock is the model's: zero is the first frame; a sound that ends before the pictures is
    followed by silence, a longer one is cut.

    Raises:
        DamagedSampleError: they cannot be decoded.
    """
    out = io.BytesIO()
    heard_too = sound is not None or has_sound(video)
    with media.opened(video) as source, av.open(out, "w", format="mp4") as sink:
        stream: Any = media.pictures(source)[0]
        rate = stream.average_rate or Fraction(25)
        shown = sink.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "fast"})
        shown.pix_fmt = "yuv420p"
        heard = sink.add_stream("aac", rate=_HZ, layout="mono") if heard_too else None
        first: int | None = None
        for frame in source.decode(stream):
            pixels_HWC = film.upright(frame, _WIDTH)
            if first is None:
                first = frame.pts
                shown.height, shown.width = pixels_HWC.shape[:2]
                shown.codec_context.time_base = stream.time_base
            drawn = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            drawn.pts, drawn.time_base = frame.pts - first, stream.time_base
            sink.mux(shown.encode(drawn))
        sink.mux(shown.encode(None))
        if heard is not None:
            for packet in _encoded(heard, _wave(video, sound)):
                sink.mux(packet)
    return out.getvalue()


def _wave(video: bytes, sound: bytes | None) -> NDArray[np.float32]:
    with opened(video, sound) as reader:
        wave = reader.clip(Need(_HZ, 0.0, reader.duration_s)).waveform
        assert wave is not None  # the reader has refused files without sound
        return np.asarray(wave[0].numpy(), dtype=np.float32)


def _encoded(stream: Any, wave_S: NDArray[np.float32]) -> list[Any]:
    frame = av.AudioFrame.from_ndarray(wave_S[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = _HZ, 0, Fraction(1, _HZ)
    return [*stream.encode(frame), *stream.encode(None)]
