"""A corpus on disk: its lists, its media by name, and how much of what is listed is there."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.manifest.media import FOREIGN_SUFFIXES, PICTURE_SUFFIXES, SUFFIXES
from mmssl.types import UserError

_RANKS = {suffix: k for k, suffix in enumerate((*SUFFIXES, *FOREIGN_SUFFIXES))}  # video first
_CHUNK = 1 << 24
_DECODER = json.JSONDecoder()
_OPENED, _COLON = re.compile(r'\s*[{,]\s*(?=")'), re.compile(r"\s*:\s*")

Rows = Iterator[dict[str, str]]


@dataclass(frozen=True)
class Clip:
    """What a layout tells of one clip.

    name: as reports call it. media: its file, or its pictures, relative to the corpus; empty where
    they are missing. sound: where it is a file of its own. row: the rest of the row.
    """

    name: str
    media: tuple[str, ...]
    row: dict[str, Any]
    sound: str = ""


@dataclass
class Coverage:
    """How many clips a corpus lists, and which of them are not there."""

    listed: Counter[str] = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)  # split, name
    unlisted: list[str] = field(default_factory=list)  # files that no list names

    def note(self, clip: Clip) -> None:
        """Count a clip."""
        split = str(clip.row.get("split", ""))
        self.listed[split] += 1
        if not clip.media:
            self.missing.append((split, clip.name))

    @property
    def found(self) -> int:
        """Clips that are there."""
        return self.listed.total() - len(self.missing)

    def table(self) -> str:
        """A line for each split, one for what is unlisted."""
        gone = Counter(split for split, _ in self.missing)
        lines = [
            f"{split or 'all'}: {n - gone[split]} of {n} listed clips ({1 - gone[split] / n:.1%})"
            for split, n in self.listed.items()
        ]
        some = ", ".join(self.unlisted[:3])
        extra = f"{len(self.unlisted)} files that no list names are left out: {some}"
        return "\n".join([*lines, extra] if self.unlisted else lines)


class Corpus:
    """The files below a folder; paths are relative to it, with slashes."""

    def __init__(self, root: Path) -> None:
        """Look through the folder once.

        Raises:
            UserError: no such folder, or an empty one.
        """
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        self.root = root
        self.reads = ""  # the list, and its line where there are some
        self.media: list[str] = []
        self.pictures: list[str] = []
        self.others: list[str] = []
        for folder, inner, names in os.walk(root):
            inner.sort()
            place = PurePosixPath(Path(folder).relative_to(root).as_posix())
            for name in sorted(names):
                self._kind(PurePosixPath(name).suffix.lower()).append(str(place / name))
        self._by_stem: dict[str, list[str]] = {}
        for path in self.media:
            self._by_stem.setdefault(PurePosixPath(path).stem, []).append(path)

    def _kind(self, suffix: str) -> list[str]:
        if suffix in _RANKS:
            return self.media
        return self.pictures if suffix in PICTURE_SUFFIXES else self.others

    def find(self, *stems: str, within: str = "") -> tuple[str, ...]:
        """The file of the first of these names (without suffix) that there is, none without.

        Of several, one below a folder called `within`, and one with pictures, goes first.
        """
        for stem in stems:
            if found := self._by_stem.get(stem):
                best = min(found, key=lambda path: (within not in path.split("/"), rank(path)))
                return (best,)
        return ()

    def lists(self, *patterns: str) -> list[str]:
        """Files other than media whose names match one of the patterns, by path."""
        found = [p for p in self.others if any(PurePosixPath(p).match(x) for x in patterns)]
        self.reads = ", ".join(str(self.root / path) for path in found[:3]) or self.reads
        return found

    def csv(
        self, path: str, names: Sequence[str] | None = None, encoding: str = "utf-8-sig"
    ) -> Rows:
        """The rows of a CSV file, by column; lines that begin with # are left out.

        Args:
            path: of the file.
            names: the columns; without, the first line has them.
            encoding: of the file.

        Raises:
            UserError: no such text, or a row with too few cells.
        """
        where = self.root / path
        with where.open(encoding=encoding, newline="") as file:
            lines = (line for line in file if not line.startswith("#"))
            reader = csv.DictReader(lines, names, restkey="", skipinitialspace=True)
            try:
                for row in reader:
                    self.reads = f"{where}:{reader.line_num}"
                    if None in row.values():
                        raise UserError(f"{where}: row {reader.line_num} has too few cells: {row}")
                    yield {name.strip(): cell for name, cell in row.items()}
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"{where}: unreadable CSV ({error})") from error

    def entries(self, path: str) -> Iterator[tuple[str, Any]]:
        """Name and value of each entry of a JSON object, which is never held as a whole.

        Raises:
            UserError: the file is no JSON object.
        """
        buffer, place, name = "", 0, ""
        self.reads = str(self.root / path)
        with (self.root / path).open(encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                buffer, place = buffer[place:] + chunk, 0
                while entry := _entry(buffer, place):
                    name, value, place = entry
                    yield name, value
        if buffer[place:].split() not in (["}"], ["{", "}"], ["{}"]):
            raise UserError(f"{self.root / path}: no JSON object, behind the entry {name!r}")


def _entry(text: str, place: int) -> tuple[str, Any, int] | None:
    """An entry, and where it ends; None where the text breaks off within it."""
    try:
        opened = _OPENED.match(text, place)
        name, place = _DECODER.raw_decode(text, opened.end() if opened else len(text))
        colon = _COLON.match(text, place)
        value, place = _DECODER.raw_decode(text, colon.end() if colon else len(text))
    except ValueError:
        return None
    return str(name), value, place


def rank(path: str) -> int:
    """Files with pictures go before those with sound alone."""
    return _RANKS[PurePosixPath(path).suffix.lower()]
