"""Re-encodes media so that it decodes fast, and cuts parts out of files.

Times are seconds from the first video frame (or first audio sample). The bytes depend on the input
and the options only: one encoder thread, bit-exact muxing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.video.reformatter import Interpolation, VideoReformatter

from mmssl.data import media
from mmssl.data.backends import rotation
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits, Track
from mmssl.types import UserError

_SCALER = Interpolation.AREA
_TICK = Fraction(1, 90_000)
_PREROLL_S = 0.25  # decoders of sound need some packets before their output is right
_JITTER_S = 0.004  # containers round time stamps to milliseconds: smaller jumps are no gaps


class _AudioCodec(NamedTuple):
    """A codec of sound: its encoder, planar and own sample format, file of its own, and rates."""

    encoder: str
    planar: str
    packed: str
    container: str
    field: str
    rates: tuple[int, ...] = ()  # none: any


_AUDIO = {
    "aac": _AudioCodec(
        *("aac", "fltp", "fltp", "mp4", "m4a"),
        rates=(48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000),
    ),
    "flac": _AudioCodec("flac", "s16p", "s16", "flac", "flac"),
    "opus": _AudioCodec(
        *("libopus", "fltp", "flt", "ogg", "ogg"), rates=(48000, 24000, 16000, 12000, 8000)
    ),
}
_HIGHEST = {"rate": 192_000, "channels": 2, "quality": 51}
_BITS = {"mono": "96k", "stereo": "160k"}


@dataclass(frozen=True)
class Encoding:
    """How to re-encode: 0 keeps the stored value; gop in frames; quality is x264's crf.

    Sound goes to `aac`, `flac` (16 bits) or `opus`, at `rate` Hz, in 1 or 2 channels.
    """

    short_side: int = 0
    gop: int = 30
    fps: float = 0.0
    quality: int = 20
    audio: str = "aac"
    rate: int = 0
    channels: int = 0

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Read `short_side=128,gop=20,fps=10,audio=flac`.

        Raises:
            UserError: an unknown name or codec, a bad number, or a rate that the codec lacks.
        """
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in kinds:
                raise UserError(f"--reencode: unknown {name!r} (known: {', '.join(kinds)})")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise UserError(f"--reencode: {name}: {value!r} is no number") from error
            lowest = 1 if name == "gop" else 0
            if name != "audio" and not lowest <= values[name] <= _HIGHEST.get(name, 10000):
                raise UserError(f"--reencode: {name}={value} is out of range")
        encoding = cls(**values)
        if encoding.audio not in _AUDIO:
            raise UserError(f"--reencode: audio={encoding.audio}: is none of {', '.join(_AUDIO)}")
        rates = _AUDIO[encoding.audio].rates
        if encoding.rate and rates and encoding.rate not in rates:
            known = ", ".join(map(str, rates))
            raise UserError(f"--reencode: rate={encoding.rate}: {encoding.audio} has {known}")
        return encoding


def verify(data: bytes, limits: Limits) -> media.Header:
    """Decode everything once and throw it away.

    Raises:
        DamagedSampleError: the file cannot be opened or decoded, or breaks a limit.
    """
    with media.opened(data) as container:
        header = media.read_header(container)
        media.check_limits(header, limits)
        for name, track in media.read_tracks(container, True, True, limits).items():
            if sum(1 for _ in _decoded(track)) == 0:
                raise DamagedSampleError("decode", f"the {name} stream decodes to nothing")
    return header


def spans(data: bytes, limits: Limits) -> dict[str, tuple[float, float]]:
    """(start, end) of the video and audio streams in seconds, from the packets.

    Raises:
        DamagedSampleError: see `media.read_tracks`.
    """
    with media.opened(data) as container:
        media.check_limits(media.read_header(container), limits)
        tracks = media.read_tracks(container, True, True, limits)
        return {name: (track.start_s, track.end_s) for name, track in tracks.items()}


def transcode(
    data: bytes, start_s: float, end_s: float, encoding: Encoding, limits: Limits
) -> tuple[str, bytes]:
    """Field name and bytes of the stretch from `start_s` to `end_s`: an mp4 (H.264), or sound.

    Raises:
        DamagedSampleError: the file cannot be decoded, or the stretch is empty.
    """
    with media.opened(data) as source:
        media.check_limits(media.read_header(source), limits)
        tracks = media.read_tracks(source, True, True, limits)
        video, audio = tracks.get("video"), tracks.get("audio")
        clock = video or audio
        if clock is None:
            raise DamagedSampleError("header", "nothing to re-encode")
        zero_s = clock.start_s
        codec, sink = _AUDIO[encoding.audio], io.BytesIO()
        name, container = ("mp4", "mp4") if video else (codec.field, codec.container)
        with av.open(sink, "w", format=container, options={"fflags": "+bitexact"}) as out:
            pictures = _Pictures(out, video, encoding) if video else None
            sounds = _Sounds(out, audio, encoding) if audio else None
            written = pictures.write(zero_s + start_s, zero_s + end_s) if pictures else 0
            written += sounds.write(zero_s + start_s, zero_s + end_s) if sounds else 0
    if not written:
        raise DamagedSampleError("cut", f"nothing lies between {start_s:g} and {end_s:g} s")
    return name, sink.getvalue()


def _decoded(track: Track, first: int = 0, last: int | None = None) -> Iterable[Any]:
    """Frames of the packets from `first` on, to before `last`."""
    for packet in track.packets[first:last]:
        yield from packet.decode()
    yield from track.stream.codec_context.decode(None)
    track.stream.codec_context.flush_buffers()


class _Pictures:
    """The video stream of the output."""

    def __init__(self, out: Any, track: Track, encoding: Encoding) -> None:
        self._out, self._track, self._encoding = out, track, encoding
        context = track.stream.codec_context
        self._size = _even_size(context.width, context.height, encoding.short_side)
        self._turns = round(rotation(track) / 90) % 4  # 90 degrees each, anticlockwise
        rate = Fraction(encoding.fps or track.stream.average_rate or 25).limit_denominator(1001)
        options = {
            "preset": "medium",
            "crf": str(encoding.quality),
            "g": str(encoding.gop),
            "bf": "0",
            "threads": "1",
            # Without it, macroblock-tree rate control gave other bytes in 1 of 1500 encodings of
            # the same frames: it uses approximate reciprocals of the processor.
            "x264-params": "cpu-independent=1",
            "flags": "+bitexact",
        }
        self._stream = out.add_stream("libx264", rate=rate, options=options)
        upright = self._size[::-1] if self._turns % 2 else self._size
        self._stream.width, self._stream.height = upright
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = _TICK
        self._reformatter = VideoReformatter()

    def write(self, start_s: float, end_s: float) -> int:
        """Encode the frames between two absolute times; returns their number."""
        count = 0
        for picture, time_s in self._chosen(start_s, end_s):
            frame = self._reformatter.reformat(
                picture, *self._size, "yuv420p", interpolation=_SCALER, threads=1
            )
            frame = _turned(frame, self._turns)
            frame.pts, frame.time_base = round((time_s - start_s) / _TICK), _TICK
            frame.pict_type = av.video.frame.PictureType.NONE
            self._out.mux(self._stream.encode(frame))
            count += 1
        if count:
            self._out.mux(self._stream.encode(None))
        return count

    def _chosen(self, start_s: float, end_s: float) -> Iterable[tuple[Any, float]]:
        """Frames with their times; with a frame rate, the latest frame at every tick of it."""
        step = 1 / self._encoding.fps if self._encoding.fps else 0.0
        tick, last, half = 0, None, 1e-3
        for picture in _decoded(self._track, *self._needed(start_s, end_s)):
            time_s = picture.pts * self._track.tick_s
            if not step:
                if start_s - half <= time_s < end_s - half:
                    yield picture, max(time_s, start_s)
                continue
            while last is not None and start_s + tick * step < min(time_s, end_s) - half:
                yield last, start_s + tick * step
                tick += 1
            last = picture
        while (
            step
            and last is not None
            and start_s + tick * step < min(self._track.end_s, end_s) - half
        ):
            yield last, start_s + tick * step
            tick += 1

    def _needed(self, start_s: float, end_s: float) -> tuple[int, int]:
        """Stretch of packets: from the key frame at or before the start to the last one shown."""
        track = self._track
        leads = [p.is_keyframe and track.time_s(p) <= start_s for p in track.packets]
        first = max((k for k, lead in enumerate(leads) if lead), default=0)
        last = max((k for pts, k in track.shown if pts * track.tick_s < end_s), default=first)
        return first, last + 1


def _even_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    factor = short_side / min(width, height) if short_side else 1.0
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))


def _turned(frame: Any, turns: int) -> Any:
    """A yuv420p picture turned by 90 degrees so many times, as a player would."""
    if not turns:
        return frame
    planes = [
        np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        for plane in frame.planes
    ]
    upright = [
        np.rot90(rows[:, : plane.width], turns)
        for rows, plane in zip(planes, frame.planes, strict=True)
    ]
    height, width = upright[0].shape
    out = av.VideoFrame(width, height, "yuv420p")
    for plane, rows in zip(out.planes, upright, strict=True):
        target = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        target[:, : plane.width] = rows
    return out


class _Sounds:
    """The audio stream of the output, at the source's rate where the codec has it."""

    def __init__(self, out: Any, track: Track, encoding: Encoding) -> None:
        self._out, self._track, self._codec = out, track, _AUDIO[encoding.audio]
        context = track.stream.codec_context
        rate, rates = encoding.rate or context.sample_rate, self._codec.rates
        self._rate = rate if not rates or rate in rates else 48000
        self._layout = "mono" if (encoding.channels or context.channels) == 1 else "stereo"
        options = {"b": _BITS[self._layout], "flags": "+bitexact"}
        self._stream = out.add_stream(
            self._codec.encoder, rate=self._rate, layout=self._layout, options=options
        )

    def write(self, start_s: float, end_s: float) -> int:
        """Encode the samples between two absolute times; returns the number of blocks."""
        length = round((end_s - start_s) * self._rate)
        runs = [(first, wave) for first, wave in self._runs(start_s, end_s) if first < length]
        low = max(0, min((first for first, _ in runs), default=0))
        high = min(length, max((first + wave.shape[1] for first, wave in runs), default=0))
        if high <= low:
            return 0
        out = np.zeros((len(runs[0][1]), high - low), runs[0][1].dtype)
        for first, wave in runs:
            begin, end = max(first, low), min(first + wave.shape[1], high)
            if begin < end:
                out[:, begin - low : end - low] = wave[:, begin - first : end - first]
        return self._encode(out, low)

    def _runs(self, start_s: float, end_s: float) -> Iterator[tuple[int, Any]]:
        """Stretches without a gap: the place of their first sample after `start_s`, and (C, S)."""
        frames: list[Any] = []
        stamp_s = expected_s = self._track.start_s  # what drains from some decoders has no time
        for frame in _decoded(self._track, *self._needed(start_s, end_s)):
            time_s = expected_s if frame.pts is None else frame.pts * self._track.tick_s
            if frames and abs(time_s - expected_s) > _JITTER_S:
                yield self._resampled(frames, stamp_s - start_s)
                frames = []
            if not frames:
                stamp_s = expected_s = time_s
            expected_s += frame.samples / frame.sample_rate
            frame.pts = None
            frames.append(frame)
        if frames:
            yield self._resampled(frames, stamp_s - start_s)

    def _resampled(self, frames: list[Any], offset_s: float) -> tuple[int, Any]:
        resampler = AudioResampler(self._codec.planar, self._layout, self._rate)
        chunks = [f.to_ndarray() for frame in [*frames, None] for f in resampler.resample(frame)]
        return round(offset_s * self._rate), np.concatenate(chunks, axis=1)

    def _needed(self, start_s: float, end_s: float) -> tuple[int, int]:
        """Stretch of packets; from the first one on where only the decoder knows the priming."""
        times = [self._track.time_s(packet) for packet in self._track.packets]
        last = sum(time < end_s for time in times)
        if start_s - self._track.start_s < 1.0:
            return 0, last
        return sum(time < start_s - _PREROLL_S for time in times), last

    def _encode(self, wave: Any, pts: int) -> int:
        blocks = 0
        for begin in range(0, wave.shape[1], 1024):
            block = wave[:, begin : begin + 1024]
            if self._codec.packed != self._codec.planar:
                block = block.T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block), format=self._codec.packed, layout=self._layout
            )
            frame.sample_rate, frame.pts = self._rate, pts + begin
            frame.time_base = Fraction(1, self._rate)
            self._out.mux(self._stream.encode(frame))
            blocks += 1
        self._out.mux(self._stream.encode(None))
        return blocks
