"""Draws heat maps over the frames of a video, and a contact sheet.

Letters in shapes: N maps over time, H rows, W columns, C colours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmssl.data.media import pictures as video_streams
from mmssl.eval import pictures
from mmssl.files import whole_file
from mmssl.types import UserError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

_COPIED = ("aac", "mp3", "opus", "ac3", "eac3", "alac", "flac")  # sound that mp4 can hold as it is
_SHOTS, _COLUMNS, _CELL = 12, 4, 320  # frames of the contact sheet, per row, width in pixels
_GAP, _STRIP = 10, 90


@dataclass(frozen=True)
class Style:
    """strength: opacity of the map at its peak; width: largest side of the result in pixels."""

    strength: float = 0.8
    width: int = 960


@dataclass(frozen=True)
class Shot:
    """A drawn frame and when it is shown (s)."""

    picture_HWC: Bytes
    time_s: float


def scale(maps_NHW: Floats) -> tuple[float, float]:
    """Median of the scores of a video, and what its top 0.2 % exceed."""
    low, high = np.quantile(maps_NHW, [0.5, 0.998])
    return float(low), float(high)


def levels(maps_NHW: Floats, ends: tuple[float, float] | None = None) -> Floats:
    """Scores to [0, 1] between the ends of a scale; default the video's own."""
    return pictures.scaled(maps_NHW, *(ends or scale(maps_NHW)))


def map_at(levels_NHW: Floats, times_N: Floats, time_s: float) -> Floats:
    """(H, W) map at a time, linear between the neighbouring bins."""
    right = int(np.searchsorted(times_N, time_s))
    if right == 0:
        return np.asarray(levels_NHW[0])
    if right == len(times_N):
        return np.asarray(levels_NHW[-1])
    share = (time_s - times_N[right - 1]) / (times_N[right] - times_N[right - 1])
    return np.asarray((1 - share) * levels_NHW[right - 1] + share * levels_NHW[right])


def draw(frame_HWC: Bytes, map_HW: Floats, whole: bool, strength: float) -> Bytes:
    """A frame with its map, on the whole picture or on the largest square in its middle."""
    height, width = frame_HWC.shape[:2]
    if whole or height == width:
        return pictures.overlay(frame_HWC, map_HW, (width, height), strength)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    out: Bytes = np.rint(0.6 * frame_HWC).astype(np.uint8)  # what the model does not see is darker
    seen = frame_HWC[top : top + side, left : left + side]
    out[top : top + side, left : left + side] = pictures.overlay(
        seen, map_HW, (side, side), strength
    )
    return out


def render(
    video: Path,
    data: bytes,
    maps_NHW: Floats,
    times_N: Floats,
    whole: bool,
    style: Style,
    target: Path,
) -> list[Shot]:
    """Write the overlay video with the original sound; returns evenly spaced frames of it.

    Args:
        video: name of the source, for messages.
        data: its bytes.
        maps_NHW: score maps.
        times_N: their times in seconds, zero = first frame.
        whole: the maps cover the whole picture, else the square in its middle.
        style: looks.
        target: mp4 file; it appears only when it is complete.

    Raises:
        UserError: the video cannot be decoded.
    """
    level = levels(maps_NHW)
    wanted = iter(np.linspace(times_N[0], times_N[-1], _SHOTS))
    due, shots = float(next(wanted)), list[Shot]()
    try:
        with (
            whole_file(target) as partial,
            av.open(io.BytesIO(data)) as source,
            av.open(str(partial), "w", format="mp4") as sink,
        ):
            copier = _Copier(source, sink)
            for picture, time_s in copier.frames(style.width):
                drawn = draw(picture, map_at(level, times_N, time_s), whole, style.strength)
                copier.write(drawn)
                if time_s >= due - 1e-6 and len(shots) < _SHOTS:
                    shots.append(Shot(drawn, time_s))
                    due = float(next(wanted, np.inf))
            copier.finish()
    except av.error.FFmpegError as error:
        raise UserError(f"{video}: cannot be decoded to the end ({error})") from error
    return shots


class _Copier:
    """Re-encodes the first stream of pictures and keeps the sound of the first audio stream."""

    def __init__(self, source: Any, sink: Any) -> None:
        self.source, self.sink = source, sink
        self.video_in, self.audio_in = video_streams(source)[0], source.streams.audio[0]
        rate = self.video_in.average_rate or Fraction(25)
        self.video_out = sink.add_stream("libx264", rate=rate, options={"crf": "20"})
        self.video_out.pix_fmt = "yuv420p"
        self.copies = self.audio_in.codec_context.name in _COPIED
        if self.copies:
            self.audio_out = sink.add_stream_from_template(self.audio_in)
        else:
            sound = self.audio_in.codec_context
            layout = "mono" if sound.channels == 1 else "stereo"
            self.audio_out = sink.add_stream("aac", rate=sound.sample_rate, layout=layout)
        self._pts = 0
        self._open = False
        self._waiting: list[Any] = []  # sound that comes before the first picture

    def frames(self, largest: int) -> Iterator[tuple[Bytes, float]]:
        """Upright RGB frames, no larger than `largest` pixels, with even sides, and their times.

        The sound is written as it comes by.
        """
        first: float | None = None
        for packet in self.source.demux(self.video_in, self.audio_in):
            if packet.stream.index == self.audio_in.index:
                self._sound(packet)
                continue
            for frame in packet.decode():
                time_s = float(frame.pts * frame.time_base)
                first = time_s if first is None else first
                self._pts = frame.pts
                yield upright(frame, largest), time_s - first

    def write(self, picture_HWC: Bytes) -> None:
        """Encode the picture at the time of the frame that was delivered last."""
        if not self._open:
            self.video_out.height, self.video_out.width = picture_HWC.shape[:2]
            self.video_out.codec_context.time_base = self.video_in.time_base
            self._open = True
            for packet in self._waiting:
                self._sound(packet)
        frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
        frame.pts, frame.time_base = self._pts, self.video_in.time_base
        self.sink.mux(self.video_out.encode(frame))

    def finish(self) -> None:
        """Empty the encoders."""
        if self._open:
            self.sink.mux(self.video_out.encode(None))
        if not self.copies:
            self.sink.mux(self.audio_out.encode(None))

    def _sound(self, packet: Any) -> None:
        if not self._open:  # the file's header needs the size of the pictures
            self._waiting.append(packet)
        elif self.copies:
            if packet.dts is not None:  # the empty packet at the end has no time
                packet.stream = self.audio_out
                self.sink.mux(packet)
        else:
            for frame in packet.decode():
                self.sink.mux(self.audio_out.encode(frame))


def upright(frame: Any, largest: int) -> Bytes:
    """A decoded frame as it is to be seen, with even sides of at most `largest` pixels."""
    factor = min(1.0, largest / max(frame.width, frame.height))
    # encoders of 4:2:0 pictures want even sides; tiny pictures are enlarged to be seen at all
    factor = max(factor, min(256, largest) / max(frame.width, frame.height))
    width, height = (max(2, 2 * round(side * factor / 2)) for side in (frame.width, frame.height))
    picture = frame.to_ndarray(format="rgb24", width=width, height=height)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else np.asarray(picture)


# --- contact sheet


def sheet(
    shots: Sequence[Shot], maps_NHW: Floats, times_N: Floats, loudness_K: Floats, target: Path
) -> None:
    """Write a picture of evenly spaced frames over strips of loudness and of the highest score.

    Args:
        shots: drawn frames, at least one.
        maps_NHW: score maps.
        times_N: their times (s).
        loudness_K: loudness in [0, 1], evenly spaced over the video.
        target: PNG file.
    """
    height, width = shots[0].picture_HWC.shape[:2]
    cell = (_CELL, max(2, round(_CELL * height / width)))
    columns, rows = min(_COLUMNS, len(shots)), -(-len(shots) // _COLUMNS)
    across = _GAP + columns * (_CELL + _GAP)
    down = _GAP + rows * (cell[1] + _GAP)
    page = Image.new("RGB", (across, down + _STRIP + 2 * _GAP), (18, 20, 26))
    for k, shot in enumerate(shots):
        row, column = divmod(k, _COLUMNS)
        place = (_GAP + column * (_CELL + _GAP), _GAP + row * (cell[1] + _GAP))
        page.paste(Image.fromarray(pictures.resized(shot.picture_HWC, cell)), place)
        _label(page, place, f"{shot.time_s:.1f} s")
    _strips(page, down, maps_NHW.max(axis=(1, 2)), times_N, loudness_K)
    with whole_file(target) as partial:
        page.save(partial, "PNG")


def _label(page: Image.Image, place: tuple[int, int], text: str) -> None:
    font, draw = ImageFont.load_default(16), ImageDraw.Draw(page)
    at = (place[0] + 8, place[1] + 6)
    draw.text(at, text, (255, 255, 255), font, stroke_width=2, stroke_fill=(0, 0, 0))


def _strips(
    page: Image.Image, top: int, scores_N: Floats, times_N: Floats, loudness_K: Floats
) -> None:
    """Loudness as grey columns, the highest score of every time bin as a line."""
    draw, left, right = ImageDraw.Draw(page), _GAP, page.width - _GAP
    floor, room = top + _STRIP, _STRIP - 22
    for x in range(left, right):
        k = int((x - left) / (right - left) * len(loudness_K))
        draw.line([x, floor, x, floor - room * loudness_K[k]], (74, 82, 98))
    end = times_N[-1] + (times_N[0] if len(times_N) == 1 else times_N[1] - times_N[0]) / 2
    xs = left + times_N / max(end, 1e-9) * (right - left)
    ys = floor - room * pictures.scaled(scores_N)
    line = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    if len(line) > 1:
        draw.line(line, (245, 160, 50), 2, joint="curve")
    font = ImageFont.load_default(14)
    draw.text((left, top), "loudness", (150, 160, 178), font)
    draw.text((left + 76, top), "highest similarity", (245, 160, 50), font)
