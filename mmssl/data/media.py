"""Containers: header, limits and the timeline of packets, all without decoding.

Letters in shapes: T frames. Times are seconds; `absolute` ones are the container's own, all others
count from the clip's zero.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import av
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from mmssl.data.integrity import DamagedSampleError

_BUFFER = 1 << 16  # bytes per read: fewer calls from FFmpeg into Python


class Limits(NamedTuple):
    """What may be decoded at all: a small file can claim what would fill the memory."""

    max_pixels: int = 16_777_216
    max_seconds: float = 600.0
    max_fps: float = 1000.0
    max_channels: int = 64


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Header:
    """What a container says before anything is decoded.

    Zero, empty or NaN where the stream is missing or does not say. `rate` and `channels` are the
    audio's, its start is absolute.
    """

    format: str
    duration_s: float
    video_streams: int = 0
    audio_streams: int = 0
    video_codec: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    pix_fmt: str = ""
    audio_codec: str = ""
    rate: int = 0
    channels: int = 0
    audio_start_s: float = math.nan

    @property
    def pixels(self) -> int:
        """Pixels of one frame."""
        return self.width * self.height


@dataclass
class Track:
    """The packets of one stream in decoding order.

    shown: (pts, index of its packet) of every packet that shows a frame, sorted by pts.
    tick_s: seconds per tick of pts.
    """

    stream: Any
    packets: list[Any] = field(default_factory=list)
    shown: list[tuple[int, int]] = field(default_factory=list)
    tick_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.tick_s = float(self.stream.time_base)

    def time_s(self, packet: Any) -> float:
        """Absolute time of a packet."""
        return float(packet.pts * self.tick_s)

    @property
    def start_s(self) -> float:
        """Absolute time of the first packet that is shown."""
        return self.shown[0][0] * self.tick_s

    @property
    def end_s(self) -> float:
        """Absolute time at which the last packet ends."""
        pts, index = self.shown[-1]
        duration = float(self.packets[index].duration or 0)
        if not duration and len(self.shown) > 1:
            duration = (pts - self.shown[0][0]) / (len(self.shown) - 1)
        return float((pts + duration) * self.tick_s)


def probe(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Header of a media file in memory.

    Raises:
        DamagedSampleError: FFmpeg cannot open it (`header`), or it breaks a limit (`bomb`).
    """
    with opened(data) as container:
        header = read_header(container)
    check_limits(header, limits)
    return header


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    """Open a file held in memory; FFmpeg never sees a path or URL, so it can open nothing else.

    Raises:
        DamagedSampleError: FFmpeg refuses it (`header`) or fails while reading on (`decode`).
    """
    try:
        container = av.open(io.BytesIO(data), buffer_size=_BUFFER, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise DamagedSampleError("header", f"FFmpeg cannot open the file: {error}") from error
    try:
        yield container
    except (av.error.FFmpegError, EOFError) as error:
        raise DamagedSampleError("decode", f"FFmpeg cannot decode the file: {error}") from error
    finally:
        container.close()


def read_header(container: Any) -> Header:
    """Header of an open container."""
    video: VideoStream | None = next(iter(pictures(container)), None)
    audio: AudioStream | None = next(iter(container.streams.audio), None)
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise DamagedSampleError("header", f"FFmpeg cannot decode its {stream.type} stream")
    seconds = math.nan if container.duration is None else container.duration / av.time_base
    values: dict[str, Any] = {
        "format": container.format.name,
        "duration_s": seconds,
        "video_streams": len(pictures(container)),
        "audio_streams": len(container.streams.audio),
    }
    if video is not None:
        values |= {
            "video_codec": video.codec_context.name,
            "width": video.codec_context.width,
            "height": video.codec_context.height,
            "fps": float(video.average_rate or 0),
            "pix_fmt": video.codec_context.pix_fmt or "",
        }
    if audio is not None:
        values |= {
            "audio_codec": audio.codec_context.name,
            "rate": audio.codec_context.sample_rate or 0,
            "channels": audio.codec_context.channels or 0,
            "audio_start_s": _start(audio),
        }
    return Header(**values)


def pictures(container: Any) -> list[VideoStream]:
    """Video streams without cover art (a single attached picture of an audio file)."""
    art = av.stream.Disposition.attached_pic
    return [s for s in container.streams.video if not s.disposition & art]


def _start(stream: Any) -> float:
    if stream.start_time is None:
        return math.nan
    return float(stream.start_time * stream.time_base)


def check_limits(header: Header, limits: Limits) -> None:
    """Refuse what would cost too much to decode.

    Raises:
        DamagedSampleError: with reason `bomb`, or `header` where there is nothing to decode.
    """
    if not header.video_streams and not header.audio_streams:
        raise DamagedSampleError("header", "the file has neither a video nor an audio stream")
    if header.video_streams and header.pixels == 0:
        raise DamagedSampleError("header", "the video stream has no frame size")
    if header.pixels > limits.max_pixels:
        size = f"{header.width} x {header.height}"
        raise DamagedSampleError("bomb", f"frames of {size} exceed {limits.max_pixels} pixels")
    if header.duration_s > limits.max_seconds:
        raise DamagedSampleError(
            "bomb", f"{header.duration_s:.1f} s exceed the limit of {limits.max_seconds:g} s"
        )
    if header.fps > limits.max_fps:
        raise DamagedSampleError("bomb", f"{header.fps:g} frames/s exceed {limits.max_fps:g}")
    if header.audio_streams and not 0 < header.channels <= limits.max_channels:
        raise DamagedSampleError("header", f"{header.channels} audio channels")


def read_tracks(container: Any, video: bool, audio: bool, limits: Limits) -> dict[str, Track]:
    """Demultiplex the first video and the first audio stream, without decoding.

    Raises:
        DamagedSampleError: no packets or packets without time stamps (`header`), or a timeline that
            breaks a limit (`bomb`).
    """
    tracks: dict[str, Track] = {}
    if video and pictures(container):
        tracks["video"] = Track(pictures(container)[0])
    if audio and container.streams.audio:
        tracks["audio"] = Track(container.streams.audio[0])
    by_index = {track.stream.index: track for track in tracks.values()}
    for track in tracks.values():
        track.stream.codec_context.thread_count = 1  # one worker, one core
    streams = [track.stream for track in tracks.values()]
    for packet in container.demux(streams) if streams else ():  # of no stream it means all
        if packet.size == 0:  # end of stream
            continue
        track = by_index[packet.stream_index]
        if packet.pts is None:
            raise DamagedSampleError(
                "header", "packets without time stamps; re-encode (make_shards --reencode)"
            )
        if not packet.is_discard:
            track.shown.append((packet.pts, len(track.packets)))
        track.packets.append(packet)
    for name, track in tracks.items():
        _check_track(name, track, limits)
    return tracks


def _check_track(name: str, track: Track, limits: Limits) -> None:
    if not track.shown:
        raise DamagedSampleError("header", f"the {name} stream is empty")
    track.shown.sort()
    seconds = track.end_s - track.start_s
    if not 0 <= seconds <= limits.max_seconds:
        raise DamagedSampleError(
            "bomb",
            f"{name} time stamps span {seconds:.1f} s, the limit is {limits.max_seconds:g} s",
        )
    if name == "video" and len(track.shown) - 1 > limits.max_fps * max(seconds, 1.0):
        raise DamagedSampleError("bomb", f"{len(track.shown)} frames in {seconds:.3f} s")
