"""What a shard sample says about itself, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmssl.data.integrity import DamagedSampleError, unseal
from mmssl.types import MODALITIES, Sample, Transcript, Word

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
    transcript: Transcript | None = None

    @property
    def texts(self) -> list[str]:
        """The captions, or what is said where there are none."""
        return list(self.captions) or ([self.transcript.text] if self.transcript else [])


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
            transcript=_transcript(record.get("transcript")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSampleError("json", f"{sample.key}.json: bad field ({error!r})") from error


def _transcript(tree: Any) -> Transcript | None:
    """Samples that were written before there were transcripts have no such entry."""
    if tree is None:
        return None
    words = (Word(float(start), float(end), str(text)) for start, end, text in tree["words"])
    return Transcript(str(tree["text"]), tuple(words))


def _first(fields: dict[str, bytes], names: tuple[str, ...]) -> bytes | None:
    return next((fields[name] for name in names if name in fields), None)
