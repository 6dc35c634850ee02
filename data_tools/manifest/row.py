"""One row of a manifest: its keys, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.manifest.media import PICTURE_SUFFIXES, Joined, Media, locate, named
from mmssl.types import MODALITIES, Transcript, UserError, Word

_KEYS = (
    "media",
    "sound",
    "caption",
    "captions",
    "transcript",
    "source",
    "split",
    "start",
    "end",
    "has",
    "meta",
    "language",
    "licence",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One clip to put into a shard; index is its number in the manifest, from 0.

    transcript: times are those of the whole file, not of the part from start_s to end_s.
    """

    where: str
    index: int
    media: Media | None
    captions: tuple[str, ...]
    source: str
    split: str
    start_s: float
    end_s: float | None
    has: tuple[str, ...] | None
    meta: dict[str, Any] = field(default_factory=dict)
    language: str = ""
    licence: str = ""
    transcript: Transcript | None = None


def parse(base: str | Path, where: str, index: int, tree: Mapping[str, Any]) -> Row:
    """A row from its keys.

    Args:
        base: folder or address that media are relative to.
        where: place of the row, for messages.
        index: its number in the manifest.
        tree: its keys; `None` is a missing one.

    Raises:
        UserError: names the place and the key, and what to do.
    """
    for key in tree:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put other fields under `meta`"
            raise UserError(f"{where}: unknown key {key!r}; {hint} (known: {', '.join(_KEYS)})")
    names = _media_names(where, tree)
    start = 0.0 if tree.get("start") is None else seconds(where, "start", tree["start"])
    end = None if tree.get("end") is None else seconds(where, "end", tree["end"])
    if end is not None and end <= start:
        raise UserError(f"{where}: end {end:g} must lie after start {start:g}")
    captions, transcript = _captions(where, tree), read_transcript(where, tree)
    if not (names or captions or transcript):
        raise UserError(f"{where}: needs `media` or a `caption`")
    stem = Path(names[0]).stem if names else f"row{index}"
    return Row(
        where=_unicode(where),
        index=index,
        media=_media(base, where, names, _text(where, tree, "sound")),
        captions=captions,
        source=_unicode(_text(where, tree, "source") or stem),
        split=_split(where, tree),
        start_s=start,
        end_s=end,
        has=_has(where, tree),
        meta=_meta(where, tree),
        language=_unicode(_text(where, tree, "language")),
        licence=_unicode(_text(where, tree, "licence")),
        transcript=transcript,
    )


def as_tree(row: Row, folder: Path) -> dict[str, Any]:
    """The keys of a row in a manifest in a folder, without those that are empty; see `parse`."""
    said = row.transcript
    words = [list(word) for word in said.words] if said else []
    tree = named(row.media, folder) | {
        "captions": list(row.captions),
        "transcript": {"text": said.text, "words": words} if said else None,
        "source": row.source,
        "split": row.split,
        "start": row.start_s,
        "end": row.end_s,
        "has": list(row.has or ()),
        "meta": row.meta,
        "language": row.language,
        "licence": row.licence,
    }
    return {key: value for key, value in tree.items() if value}


def seconds(where: str, name: str, value: Any) -> float:
    """A time from 0 on.

    Raises:
        UserError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise UserError(f"{where}: {name}: expected seconds from 0 on, got {value!r}")
    return number


def _media_names(where: str, tree: Mapping[str, Any]) -> list[str]:
    value = tree.get("media")
    names = value if isinstance(value, list) else [_text(where, tree, "media")]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: media: expected a path or a list of pictures, got {value!r}")
    return [name for name in names if name]


def _media(base: str | Path, where: str, names: Sequence[str], sound: str) -> Media | None:
    stills = [Path(name).suffix.lower() in PICTURE_SUFFIXES for name in names]
    if len(names) > 1 and not all(stills):
        raise UserError(f"{where}: media: a list must name {', '.join(PICTURE_SUFFIXES)} pictures")
    if bool(sound) < any(stills) or bool(sound) > bool(names):
        raise UserError(f"{where}: pictures need a `sound`, and `sound` needs pictures as `media`")
    found = [locate(base, name) for name in names]
    if sound:
        return Joined(tuple(found), locate(base, sound))
    return found[0] if found else None


def _text(where: str, tree: Mapping[str, Any], key: str) -> str:
    value = tree.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected text, got {value!r}")
    return value


def _unicode(text: str) -> str:
    """Text that UTF-8 can hold: a lone half of a surrogate pair becomes U+FFFD.

    JSON allows such halves, and file names that are not UTF-8 have them.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _split(where: str, tree: Mapping[str, Any]) -> str:
    split = _text(where, tree, "split")
    if split and not (
        split.isascii() and split.replace("_", "a").isalnum() and split == split.lower()
    ):
        raise UserError(f"{where}: split: {split!r} must consist of a-z, 0-9 and _")
    return split


def _captions(where: str, tree: Mapping[str, Any]) -> tuple[str, ...]:
    if tree.get("caption") is not None and tree.get("captions") is not None:
        raise UserError(f"{where}: give `caption` or `captions`, not both")
    value = tree.get("captions")
    found: Sequence[Any] = [tree.get("caption")] if value is None else value
    if not isinstance(found, list) or not all(c is None or isinstance(c, str) for c in found):
        raise UserError(f"{where}: captions: expected a list of texts, got {found!r}")
    return tuple(_unicode(c.strip()) for c in found if c and c.strip())


def read_transcript(where: str, tree: Mapping[str, Any]) -> Transcript | None:
    """The transcript of a row, its words in the order of time; None where nothing is said.

    Raises:
        UserError: it is none.
    """
    value = tree.get("transcript")
    if value is None:
        return None
    known = isinstance(value, Mapping) and set(value) <= {"text", "words"}
    text, words = (value.get("text"), value.get("words") or []) if known else (0, 0)
    if not isinstance(text, str | None) or not isinstance(words, list):
        raise UserError(
            f'{where}: transcript: expected {{"text": ..., "words": [[start, end, word], ...]}}, '
            f"got {str(value)[:80]!r}"
        )
    timed = sorted((_word(where, entry) for entry in words), key=lambda word: word[:2])
    text = " ".join(_unicode(text or " ".join(word.text for word in timed)).split())
    return Transcript(text, tuple(timed)) if text else None


def _word(where: str, entry: Any) -> Word:
    """A triple, or an object with these names (Parquet has no lists of mixed types)."""
    if isinstance(entry, Mapping):
        entry = [entry.get(name) for name in ("start", "end", "word")]
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], str):
        raise UserError(f"{where}: transcript: expected [start, end, word], got {entry!r}")
    start, end = (seconds(where, "transcript", time) for time in entry[:2])
    if end < start:
        raise UserError(f"{where}: transcript: {entry[2]!r} ends before it starts: {entry!r}")
    return Word(start, end, " ".join(_unicode(entry[2]).split()))


def _has(where: str, tree: Mapping[str, Any]) -> tuple[str, ...] | None:
    value = tree.get("has")
    if value is None:
        return None
    if not isinstance(value, list) or not value or not set(value) <= set(MODALITIES):
        raise UserError(f"{where}: has: expected some of {', '.join(MODALITIES)}, got {value!r}")
    return tuple(m for m in MODALITIES if m in value)


def _meta(where: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    value = tree.get("meta")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: meta: expected an object, got {value!r}")
    return value
