"""Re-encodes media so that it decodes fast, and cuts parts out of files.

Times are seconds from the first video frame (or first audio sample). The bytes depend on the input
and the options only: one encoder thread, bit-exact muxing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.video.reformatter import Interpolation, VideoReformatter

from mmssl.data import media
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits, Track
from mmssl.types import UserError

_SCALER = Interpolation.AREA
_TICK = Fraction(1, 90_000)
_AAC_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


@dataclass(frozen=True)
class Encoding:
    """How to re-encode: 0 keeps the stored value; gop in frames; quality is x264's crf."""

    short_side: int = 0
    gop: int = 30
    fps: float = 0.0
    quality: int = 20

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Read `short_side=128,gop=20,fps=10`.

        Raises:
            UserError: an unknown name or a bad number.
        """
        kinds: dict[str, type] = {"short_side": int, "gop": int, "fps": float, "quality": int}
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in kinds:
                raise UserError(f"--reencode: unknown {name!r} (known: {', '.join(kinds)})")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise UserError(f"--reencode: {name}: {value!r} is no number") from error
            if not 0 <= values[name] <= 10_000 or (name == "gop" and values[name] < 1):
                raise UserError(f"--reencode: {name}={value} is out of range")
        return cls(**values)


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
) -> bytes:
    """An mp4 (H.264, AAC) of the stretch from `start_s` to `end_s`.

    Raises:
        DamagedSampleError: the file cannot be decoded, or the stretch is empty.
    """
    with media.opened(data) as container:
        media.check_limits(media.read_header(container), limits)
        tracks = media.read_tracks(container, True, True, limits)
        video, audio = tracks.get("video"), tracks.get("audio")
        clock = video or audio
        if clock is None:
            raise DamagedSampleError("header", "nothing to re-encode")
        zero_s = clock.start_s
        sink = io.BytesIO()
        with av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
            pictures = _Pictures(out, video, encoding) if video else None
            sounds = _Sounds(out, audio) if audio else None
            written = pictures.write(zero_s + start_s, zero_s + end_s) if pictures else 0
            written += sounds.write(zero_s + start_s, zero_s + end_s) if sounds else 0
    if not written:
        raise DamagedSampleError("cut", f"nothing lies between {start_s:g} and {end_s:g} s")
    return sink.getvalue()


def _decoded(track: Track) -> Iterable[Any]:
    for packet in track.packets:
        yield from packet.decode()
    yield from track.stream.codec_context.decode(None)
    track.stream.codec_context.flush_buffers()


class _Pictures:
    """The video stream of the output."""

    def __init__(self, out: Any, track: Track, encoding: Encoding) -> None:
        self._out, self._track, self._encoding = out, track, encoding
        context = track.stream.codec_context
        self._size = _even_size(context.width, context.height, encoding.short_side)
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
        self._stream.width, self._stream.height = self._size
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
        for picture in _decoded(self._track):
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


def _even_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    factor = short_side / min(width, height) if short_side else 1.0
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))


class _Sounds:
    """The audio stream of the output: AAC at the source's rate where AAC has it."""

    def __init__(self, out: Any, track: Track) -> None:
        self._out, self._track = out, track
        context = track.stream.codec_context
        self._rate = context.sample_rate if context.sample_rate in _AAC_RATES else 48000
        self._layout = "mono" if context.channels == 1 else "stereo"
        bits = "96k" if self._layout == "mono" else "160k"
        options = {"b": bits, "flags": "+bitexact"}
        self._stream = out.add_stream("aac", rate=self._rate, layout=self._layout, options=options)

    def write(self, start_s: float, end_s: float) -> int:
        """Encode the samples between two absolute times; returns the number of blocks."""
        resampler = AudioResampler("fltp", self._layout, self._rate)
        first: int | None = None
        chunks = []
        for frame in _decoded(self._track):
            if first is None:
                first = round((frame.pts * self._track.tick_s - start_s) * self._rate)
            frame.pts = None
            chunks += [f.to_ndarray() for f in resampler.resample(frame)]
        chunks += [f.to_ndarray() for f in resampler.resample(None)]
        if first is None:
            return 0
        wave = np.concatenate(chunks, axis=1)
        wave = wave[:, max(0, -first) : max(0, round((end_s - start_s) * self._rate) - first)]
        return self._encode(wave, max(0, first))

    def _encode(self, wave: Any, pts: int) -> int:
        blocks = 0
        for begin in range(0, wave.shape[1], 1024):
            block = np.ascontiguousarray(wave[:, begin : begin + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts = self._rate, pts + begin
            frame.time_base = Fraction(1, self._rate)
            self._out.mux(self._stream.encode(frame))
            blocks += 1
        if blocks:
            self._out.mux(self._stream.encode(None))
        return blocks
