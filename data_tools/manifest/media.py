"""What the media of a row may be: a file, an object in a storage, or pictures with a sound."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import av

from mmssl.data import media
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.samples import AUDIO_FIELDS, VIDEO_FIELDS
from mmssl.storage import is_address, open_storage, persistently

SUFFIXES = {f".{name}": name for name in (*VIDEO_FIELDS, *AUDIO_FIELDS)} | {
    ".m4v": "mp4",
    ".oga": "ogg",
}
# Readable by FFmpeg, but only kept after re-encoding.
FOREIGN_SUFFIXES = (".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".aac", ".wma")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_TICK = Fraction(1, 1000)  # Matroska's


class Media(Protocol):
    """A media file; its text names it."""

    @property
    def suffix(self) -> str:
        """`.mp4` and the like."""
        ...

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            OSError: it cannot be read.
            DamagedSampleError: its parts do not fit together.
            StorageError: see `storage.persistently`.
        """
        ...


@dataclass(frozen=True)
class Remote:
    """An object at an address that fsspec knows; a request that fails is repeated."""

    address: str

    @property
    def suffix(self) -> str:
        """`.mp4` and the like."""
        return PurePosixPath(self.address).suffix

    def read_bytes(self) -> bytes:
        """The whole object; see `Media`."""
        files, path = open_storage(self.address)
        data: bytes = persistently(lambda: files.cat_file(path), self.address)
        return data

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True)
class Joined:
    """Silent pictures (one video, or stills that are shown for equal times) with a sound.

    Read as Matroska with the packets as they are: nothing is encoded.
    """

    pictures: tuple[Media, ...]
    sound: Media

    @property
    def suffix(self) -> str:
        """That of Matroska."""
        return ".mkv"

    def read_bytes(self) -> bytes:
        """Join the files; see `Media`."""
        sink = io.BytesIO()
        with (
            media.opened(self.sound.read_bytes()) as heard,
            av.open(sink, "w", format="matroska", options={"fflags": "+bitexact"}) as out,
        ):
            media.check_limits(media.read_header(heard), media.DEFAULT_LIMITS)
            tracks = media.read_tracks(heard, False, True, media.DEFAULT_LIMITS)
            if "audio" not in tracks:
                raise DamagedSampleError("missing", f"{self.sound}: has no sound")
            sound = tracks["audio"]
            stills = self.pictures[0].suffix.lower() in PICTURE_SUFFIXES
            add = self._add_stills if stills else self._add_video
            packets = add(out, max(sound.end_s - sound.start_s, 0.001))
            stream = out.add_stream_from_template(sound.stream)
            for packet in sound.packets:
                packet.stream = stream
            packets += sound.packets
            for packet in sorted(packets, key=lambda p: (p.dts or 0) * p.time_base):
                out.mux(packet)
        return sink.getvalue()

    def _add_video(self, out: Any, _: float) -> list[Any]:
        with media.opened(self.pictures[0].read_bytes()) as seen:
            media.check_limits(media.read_header(seen), media.DEFAULT_LIMITS)
            tracks = media.read_tracks(seen, True, False, media.DEFAULT_LIMITS)
            if "video" not in tracks:
                raise DamagedSampleError("missing", f"{self}: has no pictures")
            stream = out.add_stream_from_template(tracks["video"].stream)
            # else FFmpeg takes the clock of the codec for the rate
            stream.codec_context.framerate = tracks["video"].stream.average_rate or 25
            for packet in tracks["video"].packets:
                packet.stream = stream
            return tracks["video"].packets

    def _add_stills(self, out: Any, length_s: float) -> list[Any]:
        stream: Any = None
        sizes, packets = set(), []
        # the distance of two frames tells how long the last one is shown
        shown = self.pictures if len(self.pictures) > 1 else self.pictures * 2
        for k, picture in enumerate(shown):
            data = picture.read_bytes()
            with media.opened(data) as container:
                header = media.read_header(container)
                media.check_limits(header, media.DEFAULT_LIMITS)
                if stream is None:
                    stream = out.add_stream_from_template(container.streams.video[0])
                    stream.codec_context.framerate = Fraction(
                        len(shown) / length_s
                    ).limit_denominator()
            sizes.add((header.width, header.height, header.video_codec))
            if len(sizes) > 1:
                raise DamagedSampleError("header", f"{picture}: of another size than the first")
            packet = av.Packet(data)
            packet.pts = packet.dts = round(k * length_s / len(shown) / _TICK)
            packet.time_base = _TICK
            packet.stream, packet.is_keyframe = stream, True
            packets.append(packet)
        return packets

    def __str__(self) -> str:
        return f"{self.pictures[0]} with {self.sound}"


def locate(base: str | Path, name: str) -> Path | Remote:
    """A file that is named relative to a folder or address, or by a whole address."""
    if is_address(name):
        return Remote(name)
    if is_address(base):
        return Remote(f"{str(base).rstrip('/')}/{name}")
    return Path(base) / name


def named(media: Media | None, folder: Path | None) -> dict[str, Any]:
    """`media` and `sound` of a row in a manifest in a folder; `locate` is the way back.

    folder: that paths are relative to; without, they are absolute.
    """
    if isinstance(media, Joined):
        pictures = [_name(picture, folder) for picture in media.pictures]
        media_name = pictures if len(pictures) > 1 else pictures[0]
        return {"media": media_name, "sound": _name(media.sound, folder)}
    return {} if media is None else {"media": _name(media, folder)}


def _name(media: Media, folder: Path | None) -> str:
    if isinstance(media, Remote):
        return media.address
    path = Path(os.path.abspath(str(media)))
    if folder is None:
        return path.as_posix()
    home = Path(os.path.abspath(folder))
    return (path.relative_to(home) if path.is_relative_to(home) else path).as_posix()


def stamps(media: Media | None) -> list[tuple[int, int] | None]:
    """Size and time of change in ns of the local files of a row, None for one that is missing.

    Objects in a storage are not asked: a corpus has too many.
    """
    parts = [*media.pictures, media.sound] if isinstance(media, Joined) else [media]
    found: list[tuple[int, int] | None] = []
    for path in parts:
        if isinstance(path, Path):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
                continue
            found.append((status.st_size, status.st_mtime_ns))
    return found
