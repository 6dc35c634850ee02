"""What became of each row of an unfinished build, so that a killed one goes on where it was.

One JSON line each: the build's digest, then a sample, a row left out, or a finished shard.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av

from data_tools.manifest import Place, Row, read_rows, stamps
from data_tools.shard_rows import Options
from mmssl.data.integrity import PROFILE
from mmssl.types import UserError

JOURNAL = ".journal.jsonl"
SHARD = "shard"  # the key of entries that name a finished shard, whose tar is on the disk
_FREE = ("workers", "engine", "overwrite", "max_bad_share")  # options that change no byte


class Part:
    """The rows of one split, never held as a whole: each iteration reads the manifest anew."""

    def __init__(self, place: Place, first: Row) -> None:
        """Begin an empty one; `note` its rows, `first` among them."""
        self.place, self.split, self.where = place, first.split, first.where
        self.count = 0
        self._rows, self._files = hashlib.sha256(), hashlib.sha256()

    def note(self, row: Row) -> None:
        """Take in the next row."""
        self.count += 1
        self._rows.update(f"{row!r}\n".encode())
        self._files.update(f"{stamps(row.media)}\n".encode())

    def digest(self, options: Options) -> str:
        """Hash of all that the shards are made from; of media files size and time of change."""
        fixed = {name: value for name, value in vars(options).items() if name not in _FREE}
        rest = PROFILE, av.library_versions, sorted(fixed.items())
        parts = self._rows.hexdigest(), self._files.hexdigest(), rest
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __iter__(self) -> Iterator[Row]:
        """The rows that were noted.

        Raises:
            UserError: the manifest, or what its folder holds, has changed since.
        """
        seen = hashlib.sha256()
        for row in read_rows(self.place):
            if row.split == self.split:
                seen.update(f"{row!r}\n".encode())
                yield row
        if seen.digest() != self._rows.digest():
            raise UserError(
                f"{self.place}: changed while shards were made of it; rerun the command with "
                "--overwrite once it stays as it is"
            )


class Journal:
    """Append-only; one process has it at a time."""

    def __init__(self, folder: Path, digest: str, anew: bool) -> None:
        """Open the journal of a folder, or empty the folder and start one.

        Raises:
            UserError: another process writes it, or it is another build's and `anew` is False.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / JOURNAL).open("ab+")
        try:
            self._lock(folder)
            self._open(folder, digest, anew)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, folder: Path) -> None:
        """A killed process loses it; on file systems without locks nothing keeps two apart."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process makes these shards") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise

    def _open(self, folder: Path, digest: str, anew: bool) -> None:
        head = _line({"build": digest})
        self._file.seek(0)
        found = self._file.readline()
        if found.endswith(b"\n") and found != head and not anew:
            raise UserError(
                f"{folder}: holds an unfinished build of other rows, files or options; rerun the "
                "command that began it, or pass --overwrite to drop it"
            )
        if found != head:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != JOURNAL:
                    path.unlink()
            self._file.truncate(0)
            self.add({"build": digest})
        self._first = len(head)

    def replay(self, note: Callable[[Mapping[str, Any], bool], bool]) -> None:
        """Tell the entries in order, and drop the rest from the first that `note` refuses.

        Its second argument says whether a later entry vouches for this one: what lies before a
        finished shard was on the disk before that was.
        """
        safe = place = self._first
        for line in self._lines():
            place += len(line)
            if line.startswith(b'{"%b":' % SHARD.encode()) and line.endswith(b"\n"):
                safe = place
        place = self._first
        for line in self._lines():
            entry = _parsed(line)
            if entry is None or not note(entry, place < safe):
                break
            place += len(line)
        self._file.truncate(place)

    def _lines(self) -> Iterable[bytes]:
        self._file.seek(self._first)
        return self._file

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries in order."""
        return filter(None, map(_parsed, self._lines()))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; it outlives this process, and with `sync` the machine."""
        self._file.write(_line(entry))
        self._file.flush()

    def sync(self) -> None:
        """Have the disk take what was appended."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the journal to another process."""
        self._file.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    """An entry whose keys keep their order, for they come into lists of the folder."""
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An entry; None where a kill or a power failure tore the line."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
