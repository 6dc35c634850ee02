"""Shard folders in object storage: tars are read in place, all else is copied once.

    $XDG_CACHE_HOME/mmssl/shards/HASH/...   manifest, Energon's lists and the .tar.idx of a folder

A sample is one ranged request, whose place the .tar.idx tells. What a tar was when the folder was
opened is noted (its ETag, or what the storage has in its stead), so that one that is replaced
meanwhile is not mixed with what was read before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from mmssl.data.integrity import DamagedSampleError, canonical
from mmssl.storage import open_storage, persistently
from mmssl.types import UserError

META_FOLDER = ".nv-meta"
META_FILES = ("dataset.yaml", "split.yaml", ".info.json", "index.sqlite")
_CONNECTIONS = 16
# what tells two versions of an object apart, by storage
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")


class _Object(NamedTuple):
    size: int
    version: str


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address; `path` is the local folder that holds everything but the tars."""

    address: str
    path: Path
    tars: dict[str, _Object]

    def open(self, name: str) -> RemoteTar:
        """A tar by its name."""
        return RemoteTar(f"{self.address}/{name}", self.tars[name])


class RemoteTar:
    """Reads stretches of an object that must stay what it was."""

    def __init__(self, address: str, known: _Object) -> None:
        self._address, self._known = address, known
        self._file: Any = None
        self._owner = 0

    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` to `end`; fewer where the object ends before.

        Raises:
            DamagedSampleError: `changed`, the object is another one than it was.
            StorageError: see `persistently`.
        """
        stop = min(end, self._known.size)
        if stop <= start:
            return b""
        final = (DamagedSampleError,)
        return persistently(lambda: self._read(start, stop), self._address, final)

    def _read(self, start: int, end: int) -> bytes:
        if self._file is None or self._owner != os.getpid():  # no connection survives a fork
            self._open()
        try:
            self._file.seek(start)
            data: bytes = self._file.read(end - start)
            if len(data) < end - start:
                raise OSError(f"{len(data)} bytes came instead of {end - start}")
        except BaseException:
            self.close()  # another version shows when it is opened again
            raise
        return data

    def _open(self) -> None:
        files, path = open_storage(self._address)
        files.invalidate_cache()
        try:
            found = _object(files.info(path))
        except FileNotFoundError:
            found = None
        if found != self._known:
            raise DamagedSampleError(
                "changed", f"{self._address}: was replaced or removed since the run has opened it"
            )
        self._file = files.open(path, "rb", cache_type="none")  # one request is one stretch
        self._owner = os.getpid()

    def close(self) -> None:
        """Let go of the connection."""
        self._file = None


@cache
def remote_folder(address: str) -> RemoteFolder:
    """Open a folder; every process of a run gets the versions that were there the first time.

    Raises:
        UserError: no such folder, or see `open_storage`.
        StorageError: see `persistently`.
    """
    files, root = open_storage(address)
    try:
        found = persistently(lambda: _listing(files, root), address)
    except FileNotFoundError as error:
        raise UserError(
            f"{address}: no such shard folder; make one with data_tools.make_shards and copy it"
        ) from error
    tars = {name: found.pop(name) for name in list(found) if name.endswith(".tar")}
    content = canonical({"address": address, "files": found})
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmssl" / "shards"
    folder = home / hashlib.sha256(content).hexdigest()[:32]
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _copy(address, found, partial)
            partial.rename(folder)
    return RemoteFolder(address, folder, tars)


def _listing(files: Any, root: str) -> dict[str, _Object]:
    """What a folder of make_shards consists of, as far as it is there, by name."""
    found: dict[str, _Object] = {}
    files.invalidate_cache()
    for inner in ("", f"{META_FOLDER}/"):
        try:
            entries = files.ls(f"{root}/{inner}".rstrip("/"), detail=True)
        except FileNotFoundError:
            if not inner:
                raise
            continue  # the check of the folder says what is missing
        for info in entries:
            name = str(info["name"]).rpartition("/")[2]
            ours = name in META_FILES if inner else name.endswith((".json", ".tar", ".tar.idx"))
            if ours and info["type"] == "file":
                found[inner + name] = _object(info)
    return found


def _object(info: dict[str, Any]) -> _Object:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return _Object(int(info["size"]), version)


def _copy(address: str, found: dict[str, _Object], target: Path) -> None:
    """Files to a local folder, several at a time."""
    (target / META_FOLDER).mkdir(parents=True)
    files, root = open_storage(address)

    def fetch(name: str) -> None:
        files.get_file(f"{root}/{name}", str(target / name))
        size = (target / name).stat().st_size
        if size != found[name].size:
            raise OSError(f"{size} bytes came instead of {found[name].size}")

    def fetch_all(name: str) -> None:
        persistently(lambda: fetch(name), f"{address}/{name}")

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        arrived = pool.map(fetch_all, found)
        for _ in tqdm(arrived, total=len(found), desc=f"lists of {address}", disable=None):
            pass
