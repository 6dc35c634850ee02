"""Source manifests: JSON lines, CSV, or a plain folder of media.

A row names one clip: `media` (path relative to the manifest), `caption` or `captions`, `source`,
`split`, `start` and `end` in seconds, `has` (modalities to use), `meta` (anything), `language`,
`licence`. All are optional except that a row needs media or a caption.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmssl.data.samples import AUDIO_FIELDS, VIDEO_FIELDS
from mmssl.types import MODALITIES, UserError

SUFFIXES = {f".{name}": name for name in (*VIDEO_FIELDS, *AUDIO_FIELDS)} | {
    ".m4v": "mp4",
    ".oga": "ogg",
}
# Readable by FFmpeg, but only kept after re-encoding.
FOREIGN_SUFFIXES = (".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".aac", ".wma")
_KEYS = (
    "media",
    "caption",
    "captions",
    "source",
    "split",
    "start",
    "end",
    "has",
    "meta",
    "language",
    "licence",
)


@dataclass(frozen=True)
class Row:
    """One clip to put into a shard; index is its number in the manifest, from 0."""

    where: str
    index: int
    media: Path | None
    captions: tuple[str, ...]
    source: str
    split: str
    start_s: float
    end_s: float | None
    has: tuple[str, ...] | None
    meta: dict[str, Any] = field(default_factory=dict)
    language: str = ""
    licence: str = ""


def read_rows(path: Path) -> list[Row]:
    """Rows of one manifest, or of a folder of media with caption files beside them.

    Raises:
        UserError: names the file, line and key, and what to do.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        rows = list(_folder_rows(path))
        if not rows:
            raise UserError(f"{path}: no media files ({', '.join(SUFFIXES)}) in this folder")
        return rows
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise UserError(f"{path}: a manifest is a .jsonl or .csv file, or a folder of media")
    rows = [
        _row(path, line, index, tree)
        for index, (line, tree) in enumerate(readers[path.suffix](path))
    ]
    if not rows:
        raise UserError(f"{path}: the manifest is empty")
    return rows


def find_manifests(path: Path) -> list[Path]:
    """A folder's own manifests (`*.jsonl`, `*.csv` at its top), or the path itself."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".csv"))
        return inside or [path]
    return [path]


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _json_object(path, line, text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{line}: not a JSON object ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}:{line}: expected one JSON object per line, got {text.strip()[:40]!r}"
        )
    return tree


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="\0extra")
        try:
            for values in reader:
                if "\0extra" in values:
                    raise UserError(
                        f"{path}:{reader.line_num}: more cells than the header has columns"
                    )
                yield reader.line_num, _csv_object(path, reader.line_num, values)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}:{reader.line_num}: unreadable CSV ({error})") from error


def _csv_object(path: Path, line: int, values: Mapping[str, str | None]) -> dict[str, Any]:
    """Empty cells are left out; `meta.x` columns go into meta; `has` is separated by spaces."""
    tree: dict[str, Any] = {}
    for name, cell in values.items():
        if cell is None or cell == "":
            continue
        if name.startswith("meta."):
            tree.setdefault("meta", {})[name[5:]] = cell
        elif name in ("start", "end"):
            tree[name] = _number(path, line, name, cell)
        elif name == "has":
            tree[name] = cell.split()
        elif name in ("meta", "captions"):
            try:
                tree[name] = json.loads(cell)
            except ValueError as error:
                raise UserError(f"{path}:{line}: {name}: not JSON ({error})") from error
        else:
            tree[name] = cell
    return tree


def _number(path: Path, line: int, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise UserError(f"{path}:{line}: {name}: expected seconds from 0 on, got {value!r}")
    return number


def _row(path: Path, line: int, index: int, tree: Mapping[str, Any]) -> Row:
    where = f"{path}:{line}"
    for key in tree:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "put other fields under `meta`"
            raise UserError(f"{where}: unknown key {key!r}; {hint} (known: {', '.join(_KEYS)})")
    media = _text(where, tree, "media")
    start = _number(path, line, "start", tree["start"]) if tree.get("start") is not None else 0.0
    end = _number(path, line, "end", tree["end"]) if tree.get("end") is not None else None
    if end is not None and end <= start:
        raise UserError(f"{where}: end {end:g} must lie after start {start:g}")
    captions = _captions(where, tree)
    if not media and not captions:
        raise UserError(f"{where}: needs `media` or a `caption`")
    return Row(
        where=where,
        index=index,
        media=path.parent / media if media else None,
        captions=captions,
        source=_text(where, tree, "source") or (Path(media).stem if media else f"row{index}"),
        split=_split(where, tree),
        start_s=start,
        end_s=end,
        has=_has(where, tree),
        meta=_meta(where, tree),
        language=_text(where, tree, "language"),
        licence=_text(where, tree, "licence"),
    )


def _text(where: str, tree: Mapping[str, Any], key: str) -> str:
    value = tree.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: expected text, got {value!r}")
    return value


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
    return tuple(c.strip() for c in found if c and c.strip())


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


def _folder_rows(folder: Path) -> Iterator[Row]:
    known = (*SUFFIXES, *FOREIGN_SUFFIXES)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    for index, path in enumerate(files):
        beside = path.with_suffix(".txt")
        lines = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else []
        name = path.relative_to(folder)
        yield Row(
            where=str(path),
            index=index,
            media=path,
            captions=tuple(line.strip() for line in lines if line.strip()),
            source=str(name.with_suffix("")),
            split="",
            start_s=0.0,
            end_s=None,
            has=None,
        )
