"""What a shard sample says about itself, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmssl.data.integrity import DamagedSampleError, unseal
from mmssl.types import MODALITIES, Sample

VIDEO_FIELDS = ("mp4", "webm", "mkv", "mov")
AUDIO_FIELDS = ("flac", "wav", "opus", "ogg", "m4a", "mp3")


@dataclass(frozen=True)
class Record:
    """The json of a sample with its media bytes.

    has: modalities the sample offers; a stream that is not named here is treated as missing.
    video, sound: the container with pictures (which may carry the audio) and a separate audio file.
    """

    key: str
    source: str
    index: int
    has: frozenset[str]
    captions: tuple[str, ...]
    meta: dict[str, Any]
    video: bytes | None
    sound: bytes | None


def read(sample: Sample) -> Record:
    """Verify the checksums of a sample and read its json.

    Raises:
        DamagedSampleError: see `integrity.unseal`; also `json` where a field has the wrong type.
    """
    record = unseal(sample.key, sample.fields)
    try:
        return Record(
            key=sample.key,
            source=str(record["source"]),
            index=int(record["index"]),
            has=frozenset(record["has"]) & frozenset(MODALITIES),
            captions=tuple(str(c) for c in record["captions"]),
            meta=dict(record["meta"]),
            video=_first(sample.fields, VIDEO_FIELDS),
            sound=_first(sample.fields, AUDIO_FIELDS),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSampleError("json", f"{sample.key}.json: bad field ({error!r})") from error


def _first(fields: dict[str, bytes], names: tuple[str, ...]) -> bytes | None:
    return next((fields[name] for name in names if name in fields), None)
