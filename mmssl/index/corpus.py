"""What a corpus holds: the samples of shards, or the media files below a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmssl.data import energon, media, samples
from mmssl.data.folders import MANIFEST, read_manifest
from mmssl.data.guarded import intact
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.reader import ShardReader
from mmssl.data.samples import AUDIO_FIELDS, VIDEO_FIELDS, Record
from mmssl.embed.media import LIMITS
from mmssl.files import is_file, sha256
from mmssl.storage import is_address
from mmssl.types import UserError

IMAGES = ("png", "jpg", "jpeg", "bmp")
MEDIA = (*VIDEO_FIELDS, *AUDIO_FIELDS, *IMAGES, "avi", "aac", "m4v")
PLACE = ("folder", "shard", "number", "key")  # of an entry
_FILES = 32  # of a folder, in one block


class Unit(NamedTuple):
    """A shard or a file, and what changes when its content does."""

    name: str
    content: str


@dataclass(frozen=True)
class Entry:
    """A sample or a file.

    folder: path or address of the corpus; shard, number: its place there, "" and 0 for a file,
    whose `key` is its path below the folder. media: what `EmbeddingModel` reads, without text.
    content: a hash of what each modality is made of.
    """

    key: str
    source: str
    folder: str
    shard: str = ""
    number: int = 0
    captions: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    media: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Damage:
    """What stands in the place of an entry that cannot be read."""

    key: str
    message: str


class Corpus(Protocol):
    """Blocks of units, the same for every process that looks, and what is in them."""

    name: str

    def blocks(self) -> list[list[Unit]]:
        """Units that are encoded together."""

    def count(self, units: Iterable[Unit]) -> int:
        """How many entries some of the units hold."""

    def entries(self, units: Iterable[Unit]) -> Iterator[Entry | Damage]:
        """What some of the units hold, in order."""


def open_corpus(data: str, max_bytes: int) -> Corpus:
    """Shards, by their folder or address, or a folder of media files.

    max_bytes: a larger sample of a shard is damage.

    Raises:
        UserError: no such folder, nothing in it that can be read, or a damaged manifest.
    """
    root = Path(data)
    if is_address(data) or (root / MANIFEST).is_file() or any(root.glob(f"*/{MANIFEST}")):
        return Shards(data, max_bytes)
    if not root.is_dir():
        raise UserError(f"{data}: no such folder; name a folder of shards or of media files")
    files = Files(root.resolve())
    if not files.paths:
        raise UserError(f"{data}: holds neither shards nor media files ({', '.join(MEDIA)})")
    return files


class Shards:
    """The samples of a folder of shards."""

    def __init__(self, data: str, max_bytes: int) -> None:
        """Check the folder's lists."""
        self._shards = read_manifest(data)
        self._sizes = {shard.name: shard.samples for shard in self._shards}
        self.name = data.rstrip("/") if is_address(data) else str(Path(data).resolve())
        self._data, self._max_bytes = data, max_bytes

    def blocks(self) -> list[list[Unit]]:
        """Every shard is one."""
        return [[Unit(shard.name, shard.sha256)] for shard in self._shards]

    def count(self, units: Iterable[Unit]) -> int:
        """Samples of some shards."""
        return sum(self._sizes[name] for name, _ in units)

    def entries(self, units: Iterable[Unit]) -> Iterator[Entry | Damage]:
        """The samples of some shards."""
        firsts = dict(zip(self._sizes, accumulate(self._sizes.values(), initial=0), strict=False))
        for name, _ in units:
            for number in range(firsts[name], firsts[name] + self._sizes[name]):
                yield self._entry(name, number)

    @cached_property
    def reader(self) -> ShardReader:
        """Samples by their number."""
        with energon.quiet():
            config = energon.worker_config(0, 1, 0, 0)
            return energon.Shards(self._data, config, False, self._max_bytes).reader()

    def _entry(self, shard: str, number: int) -> Entry | Damage:
        crude = self.reader[number]
        key = str(crude["__key__"])
        try:
            record = samples.read(intact(crude))
        except DamagedSampleError as error:
            return Damage(key, str(error))
        streams = {"audio": record.sound or record.video, "video": record.video}
        found = {m: data for m, data in streams.items() if m in record.has and data is not None}
        return Entry(
            key=record.key,
            source=record.source,
            folder=self.name,
            shard=shard,
            number=number,
            captions=tuple(record.texts) if "text" in record.has else (),
            meta=_words(record.meta),
            media=found,
            content={m: hashlib.sha256(data).hexdigest() for m, data in found.items()},
        )


class Files:
    """The media files below a folder; `clip.txt` holds the caption of `clip.mp4`."""

    def __init__(self, root: Path) -> None:
        """List them."""
        self.name, self._root = str(root), root
        self.paths = sorted(
            path
            for path in root.rglob("*")
            if path.suffix[1:].lower() in MEDIA and not path.name.startswith(".")
        )

    def blocks(self) -> list[list[Unit]]:
        """Some files each, in the order of their names."""
        units = [Unit(p.relative_to(self._root).as_posix(), _state(p)) for p in self.paths]
        units = [Unit(_utf8(name), state) for name, state in units]
        return [units[k : k + _FILES] for k in range(0, len(units), _FILES)]

    def count(self, units: Iterable[Unit]) -> int:
        """Every file is one."""
        return len(list(units))

    def entries(self, units: Iterable[Unit]) -> Iterator[Entry | Damage]:
        """Some of the files."""
        for name, _ in units:
            path = self._root / name
            try:
                if not path.exists():
                    raise UserError(f"{name}: a link to nothing, or its name is not UTF-8")
                found, content = media_of(path), sha256(path)
                caption = path.with_suffix(".txt")
                words = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
            except (UserError, OSError, ValueError) as error:
                yield Damage(name, str(error))
                continue
            yield Entry(
                key=name,
                source=name,
                folder=self.name,
                captions=(words,) if words else (),
                media=found,
                content=dict.fromkeys(found, content),
            )


@cache
def _opened_shards(folder: str, max_bytes: int) -> Shards:
    return Shards(folder, max_bytes)


def record_of(place: Mapping[str, Any], max_bytes: int) -> Record:
    """The sample or file of an `Entry`, with its media.

    A file is in `video` if it has pictures, else in `sound`. place: `PLACE` of it, and perhaps
    more. max_bytes: of a sample.

    Raises:
        UserError: it is not there any more, or cannot be read.
    """
    folder, shard, number, key = (place[name] for name in PLACE)
    try:
        if not shard:
            data = (Path(folder) / key).read_bytes()
            header = media.probe(data, LIMITS)
            streams = {"audio": header.audio_streams, "video": header.video_streams}
            has = frozenset(modality for modality, count in streams.items() if count)
            both = (data, None) if "video" in has else (None, data)
            return Record(key, key, 0, has, (), {}, *both)
        record = samples.read(intact(_opened_shards(folder, max_bytes).reader[number]))
    except FileNotFoundError as error:
        raise UserError(f"{key}: is not in {folder} any more") from error
    except (DamagedSampleError, OSError, IndexError) as error:
        raise UserError(f"{key}: cannot be read from {folder} ({error})") from error
    if record.key != key:
        raise UserError(
            f"{key}: {folder} has changed; run mmssl index build with it again, or start anew"
        )
    return record


def media_of(path: Path) -> dict[str, Any]:
    """Modality to what `EmbeddingModel` reads, for all that a media file holds.

    A picture is a video of one frame.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.suffix[1:].lower() in IMAGES:
            return {"video": picture_of(path)}
        header = media.probe(path.read_bytes(), LIMITS)
    except (DamagedSampleError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as sound, video or picture ({error})") from error
    streams = {"audio": header.audio_streams, "video": header.video_streams}
    return {modality: path for modality, count in streams.items() if count}


def picture_of(path: Path) -> tuple[NDArray[np.uint8], float]:
    """A picture as (1, H, W, 3) frames, one per second.

    Raises:
        ValueError: it cannot be read, or is too large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > LIMITS.max_pixels:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{size} pixels exceed {LIMITS.max_pixels}")
            return np.array(image.convert("RGB"))[None], 1.0
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error and many more
        raise ValueError(error) from error


def _utf8(name: str) -> str:
    """A name that can be written; of one that is not UTF-8 it is that of no file."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _state(path: Path) -> str:
    """Size and time of a file and of its caption; of what is not there, a dangling link, none."""
    files = [f for f in (path, path.with_suffix(".txt")) if is_file(f)]
    return " ".join(f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in files)


def _words(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """`name=value` for the plain values of a sample's meta."""
    plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float)}
    return tuple(f"{name}={value}" for name, value in sorted(plain.items()))
