"""One manifest row to one shard sample: read, check, cut or re-encode, seal.

Why a row is left out: `file` (cannot be read), `header`, `bomb`, `decode` (see `mmssl.data.media`),
`cut` (no such stretch), `missing` (a modality that `has` names), `format` (needs --reencode),
`meta` (no JSON), `duplicate` (of an earlier row); `timeout`, `memory`, `crash`, `error` (see
`data_tools.children`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools import transcode
from data_tools.manifest import SUFFIXES, Row
from data_tools.transcode import Encoding
from mmssl.data import media
from mmssl.data.confine import out_of_memory, peak_mb
from mmssl.data.integrity import PROFILE, DamagedSampleError, seal, valid_key
from mmssl.data.media import Limits
from mmssl.data.samples import AUDIO_FIELDS
from mmssl.types import Transcript, Word

_CUT_TOLERANCE_S = 0.1  # a manifest's `end` this close to the end of the file asks for no cut


@dataclass(frozen=True)
class Options:
    """How to make shards; sizes are upper limits of one shard.

    row_seconds, row_mb: time and memory (address space) for one row, which ends as `timeout` or
    `memory`. max_bad_share: of 1000 successive rows, so many may be bad.
    """

    shard_samples: int = 10_000
    shard_mb: float = 256.0
    workers: int = 1
    reencode: Encoding | None = None
    verify: bool = True
    overwrite: bool = False
    engine: str = "local"
    max_bad_share: float = 0.5
    row_seconds: float = 300.0
    row_mb: int = 2048
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Made:
    """One row after its media was read: the members of its sample, or why there is none.

    peak_mb: most memory that the process which read it has had so far.
    """

    row: Row
    key: str = ""
    members: tuple[tuple[str, bytes], ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    captions: int = 0
    reason: str = ""
    message: str = ""
    peak_mb: int = 0


def prepare(row: Row, options: Options) -> Made:
    """Read, check and if asked re-encode one row, whose bytes depend on nothing else.

    Raises:
        DamagedSampleError: FFmpeg had no memory.
    """
    try:
        made = _prepared(row, options)
    except DamagedSampleError as error:
        if out_of_memory(error):
            raise
        made = Made(row, reason=error.reason, message=str(error))
    except OSError as error:
        made = Made(row, reason="file", message=f"{row.media}: {error.strerror or error}")
    return replace(made, peak_mb=peak_mb())


def _prepared(row: Row, options: Options) -> Made:
    members: list[tuple[str, bytes]] = []
    header, found, length_s = None, set(), 0.0
    said = row.transcript
    texts = row.captions or ((said.text,) if said else ())
    digest = hashlib.sha256("\n".join(texts).encode())
    if row.media is not None:
        source = row.media.read_bytes()
        digest = hashlib.sha256(source)
        name, data, length_s, cut_short = _media(row, source, options)
        if cut_short:  # parts that begin together are not the same clip
            digest.update(f" to {row.end_s}".encode())
        if options.verify:
            header = transcode.verify(data, options.limits)
        else:
            header = media.probe(data, options.limits)
        found = _streams(name, header)
        members.append((name, data))
    said = said and _of_part(said, row.start_s, length_s)
    found |= {"text"} if row.captions or said else set()
    has = _has(row, found)
    captions = row.captions if "text" in has else ()
    if captions:
        members.append(("txt", captions[0].encode()))
    key = sample_key(row.source, digest.hexdigest(), row.start_s)
    start = row.start_s
    record = {
        "profile": PROFILE,
        "key": key,
        "source": row.source,
        "index": row.index,
        "start": start,
        "end": start + length_s,
        "fps": 0.0 if header is None else round(header.fps, 6),
        "rate": 0 if header is None else header.rate,
        "width": 0 if header is None else header.width,
        "height": 0 if header is None else header.height,
        "language": row.language,
        "licence": row.licence,
        "captions": list(captions),
        "has": has,
        "meta": row.meta,
    }
    if said and "text" in has:
        words = [[round(w.start_s, 3), round(w.end_s, 3), w.text] for w in said.words]
        record["transcript"] = {"text": said.text, "words": words}
    members.append(("json", _sealed(row, record, dict(members))))
    seconds = tuple((m, length_s) for m in has if m != "text")
    return Made(row, key, tuple(members), seconds, len(captions))


def _sealed(row: Row, record: dict[str, Any], members: dict[str, bytes]) -> bytes:
    try:
        return seal(record, members)
    except (TypeError, ValueError) as error:
        raise DamagedSampleError("meta", f"{row.where}: meta cannot be stored ({error})") from error


def _media(row: Row, data: bytes, options: Options) -> tuple[str, bytes, float, bool]:
    """Field name, bytes and length in s of what goes into the shard, whether it ends early."""
    assert row.media is not None
    spans = transcode.spans(data, options.limits)
    first, last = spans.get("video") or spans["audio"]
    length = last - first
    if not length:
        raise DamagedSampleError("header", "it lasts 0 s")
    end = length if row.end_s is None else min(row.end_s, length)
    if row.start_s >= length:
        raise DamagedSampleError(
            "cut", f"start {row.start_s:g} s lies after the end ({length:.3f} s)"
        )
    short = end < length - _CUT_TOLERANCE_S
    name = SUFFIXES.get(row.media.suffix.lower())
    if row.start_s > 0 or short or options.reencode is not None:
        encoding = options.reencode or Encoding()
        name, data = transcode.transcode(data, row.start_s, end, encoding, options.limits)
        return name, data, end - row.start_s, short
    if name is None:
        raise DamagedSampleError(
            "format", f"{row.media}: {row.media.suffix} is not kept in shards; pass --reencode"
        )
    return name, data, length, short


def _of_part(said: Transcript, start_s: float, length_s: float) -> Transcript | None:
    """What is said in a part of the file, on its clock; text without times is said throughout."""
    if not said.words:
        return Transcript(said.text, (Word(0.0, length_s, said.text),))
    if not length_s:  # text alone
        return said
    part = said.within(start_s, start_s + length_s)
    inside = (
        Word(max(0.0, w.start_s - start_s), min(length_s, w.end_s - start_s), w.text)
        for w in part.words
    )
    return Transcript(part.text, tuple(inside)) if part.words else None


def _streams(name: str, header: media.Header) -> set[str]:
    found = {"audio"} if header.audio_streams else set()
    if header.video_streams and name not in AUDIO_FIELDS:
        found.add("video")
    return found


def _has(row: Row, found: set[str]) -> list[str]:
    if row.has is None:
        return sorted(found)
    lacking = set(row.has) - found
    if lacking:
        raise DamagedSampleError(
            "missing", f"{row.where}: `has` names {sorted(lacking)}, which the clip lacks"
        )
    return sorted(row.has)


def sample_key(source: str, digest: str, start_s: float) -> str:
    """`<source>-<hash of content and end>-<start in ms>` in the characters that keys may have."""
    slug = re.sub(r"[^a-z0-9_]+", "_", source.lower()).strip("_")[:40] or "clip"
    key = f"{slug}-{digest[:16]}-{round(start_s * 1000)}"
    assert valid_key(key), key
    return key
