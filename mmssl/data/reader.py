"""Reads the samples of a shard folder by number, whatever happened to its files.

The `.tar.idx` of a shard lists where each sample begins and the last one ends; a sample is what
fills its stretch exactly: plain files of one key, nothing else. No link, sparse file, long name or
other extension of the tar format is followed, and nothing is read that the stretch does not hold,
so a hostile header costs no memory. `index.sqlite` tells which key stands where, so that a copy of
another sample is no sample.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.energon import CrudeSample
from megatron.energon.epathlib import EPath
from megatron.energon.source_info import SourceInfo
from numpy.typing import NDArray

from mmssl.data.folders import ShardFolder, Tar
from mmssl.data.integrity import DamagedSampleError, valid_key
from mmssl.data.remote import META_FOLDER
from mmssl.storage import StorageError

# Entries of a sample besides its members: why it cannot be read, and what is wrong with the index.
ERROR, REASON, NOTE = "__mmssl_error__", "__mmssl_reason__", "__mmssl_note__"
STORAGE = "storage"  # the reason that ends a run
OPEN_SHARDS = 16  # at once
_MAX_MEMBERS = 64
_FIELD = re.compile(r"[a-z0-9]{1,16}")
_SQL_STEPS, _SQL_BYTES = 100_000, 1 << 16  # a look-up takes some twenty steps


class _Shard(NamedTuple):
    tar: Tar
    offsets: NDArray[np.uint64]
    whole: bool  # the .tar.idx has the right length


class ShardReader:
    """Samples by number; what cannot be read comes back as a marked sample.

    Energon's own reader ends the iteration at the first damage.
    """

    def __init__(self, folder: ShardFolder, shards: Sequence[Any], max_bytes: int) -> None:
        """Note the shards (Energon's `ShardInfo`) of a folder; a larger sample is damage."""
        self._folder, self._shards, self._max_bytes = folder, shards, max_bytes
        self._path = EPath(folder.path)
        self._firsts = list(accumulate((shard.count for shard in shards), initial=0))
        self._open: dict[int, _Shard] = {}
        self._index = _KeyIndex(folder.path / META_FOLDER / "index.sqlite")
        self._noted: set[int] = set()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> CrudeSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._firsts, index) - 1
        name = self._shards[shard].name
        crude: dict[str, Any] = {
            "__key__": f"#{index}",
            "__shard__": name,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (
                SourceInfo(dataset_path=self._path, index=index, shard_name=name, file_names=()),
            ),
        }
        try:
            number = index - self._firsts[shard]
            key, fields = self._members(shard, number)
            note = self._check_place(shard, number, key)
        except DamagedSampleError as error:
            reason, message = error.reason, str(error)
        except StorageError as error:
            reason, message = STORAGE, str(error)
        except Exception as error:  # damage may show as any error: marked, then counted
            reason, message = "tar", f"{type(error).__name__}: {error}"
        else:
            return CrudeSample(crude | {"__key__": key}, **fields, **note)
        return CrudeSample(crude, **{ERROR: message, REASON: reason})

    def _shard(self, shard: int) -> _Shard:
        """The open files of a shard, those of the least recently used one closed."""
        found = self._open.pop(shard, None)
        if found is None:
            name, size = self._shards[shard].name, 8 * (self._shards[shard].count + 1)
            raw = (self._folder.path / f"{name}.idx").read_bytes()
            offsets = np.frombuffer(raw[: len(raw) // 8 * 8], "<u8")
            found = _Shard(self._folder.open(name), offsets, len(raw) == size)
        self._open[shard] = found
        if len(self._open) > OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).tar.close()
        return found

    def _members(self, shard: int, number: int) -> tuple[str, dict[str, bytes]]:
        tar, offsets, _ = self._shard(shard)
        start, end = (*map(int, offsets[number : number + 2]), 0, 0)[:2]
        if not start < end:
            raise DamagedSampleError("index", f"the .tar.idx has no place for sample {number}")
        if end - start > self._max_bytes:
            raise DamagedSampleError(
                "bomb", f"{end - start} bytes exceed data.max_bytes = {self._max_bytes}"
            )
        return _read_members(tar.read(start, end), end - start)

    def _check_place(self, shard: int, number: int, key: str) -> dict[str, str]:
        """Refuse a copy of another sample; returns a note, once per shard, about a bad index."""
        listed = self._index.holds(shard, number, key)
        if listed is False:
            raise DamagedSampleError("key", f"{key}: stands at the place of another sample")
        intact = listed and self._open[shard].whole
        if intact or shard in self._noted:
            return {}
        self._noted.add(shard)
        return {NOTE: f"{'.tar.idx' if listed else 'index.sqlite'} of the shard is damaged"}


def _read_members(stretch: bytes, size: int) -> tuple[str, dict[str, bytes]]:
    """(key, bytes by field) of the plain files that fill a stretch of a tar of this size."""
    key, fields, place = "", dict[str, bytes](), 0
    while place < size:
        first = place + tarfile.BLOCKSIZE
        info = tarfile.TarInfo.frombuf(stretch[place:first], "utf-8", "strict")
        stem, _, name = info.name.partition(".")
        place = first + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DamagedSampleError("tar", f"{info.name!r} is no plain file")
        if not valid_key(stem) or not _FIELD.fullmatch(name):
            raise DamagedSampleError("tar", f"{info.name!r} is no name of a member")
        if stem != (key or stem) or name in fields or len(fields) == _MAX_MEMBERS:
            raise DamagedSampleError("tar", f"{info.name!r} does not belong to the sample {key}")
        if info.size < 0 or place > size:
            raise DamagedSampleError("tar", f"{info.name!r} is larger than its sample")
        key, fields[name] = stem, stretch[first : first + info.size]
        if len(fields[name]) < info.size:
            raise DamagedSampleError("tar", f"the file ends within {info.name!r}")
    return key, fields


class _KeyIndex:
    """Energon's list of keys; damage is no end, and a hostile file cannot make look-ups long."""

    def __init__(self, path: Path) -> None:
        self._path, self._owner = path, 0

    def holds(self, shard: int, number: int, key: str) -> bool | None:
        """Whether the key stands at this place; None where the index cannot tell."""
        try:
            if self._owner != os.getpid():  # a connection must not be carried through a fork
                self._connect()
            place = "SELECT sample_key FROM samples WHERE tar_file_id = ? AND sample_index = ?"
            row = self._database.execute(place, (shard, number)).fetchone()
            if row is not None and row[0] == key.encode():
                return True
            found = self._database.execute("SELECT 1 FROM samples WHERE sample_key = ?", (key,))
            return False if row is not None and found.fetchone() is not None else None
        except (sqlite3.Error, UnicodeDecodeError):  # the message of the error may be damaged, too
            return None

    def _connect(self) -> None:
        uri = f"{self._path.resolve().as_uri()}?mode=ro&immutable=1"
        self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self._database.text_factory = bytes
        self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _SQL_BYTES)
        self._database.set_progress_handler(lambda: 1, _SQL_STEPS)
        self._owner = os.getpid()
