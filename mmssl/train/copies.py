"""Checkpoints at a second location, e.g. object storage: written meanwhile, fetched when needed.

    URL/step-00000100/...     the files of the checkpoint; its manifest comes last

Any address that fsspec knows: s3://bucket/path (with the extra `s3`), gs://, a mounted folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mmssl.storage import open_storage, persistently
from mmssl.train.commit import MANIFEST, TEMPORARY, problem, read_manifest
from mmssl.types import UserError

_KEY = "train.copy_to"


class Copies:
    """Copies committed folders one after the other, while the training goes on.

    A copy that fails is reported through `tell` and is no reason to stop. Nothing is ever removed
    at the second location.
    """

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        """Open the location.

        Raises:
            UserError: fsspec does not know the address, or lacks a package for it.
        """
        self.url, self._tell = url.rstrip("/"), tell
        self._files, self._root = open_storage(self.url, _KEY)
        self._queue: SimpleQueue[Path | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._newest: Path | None = None
        self.busy: Path | None = None  # what is being read

    def put(self, folder: Path) -> None:
        """Copy a folder; returns at once. Of those that wait only the newest is copied."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="copies", daemon=True)
            self._thread.start()
        self._newest = folder
        self._queue.put(folder)

    def close(self, limit_s: float | None = None) -> None:
        """Wait for the newest copy, so many seconds at most; what is left then stays behind."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(limit_s)

    def _work(self) -> None:
        for folder in iter(self._queue.get, None):
            if folder == self._newest:
                self.busy = folder
                self._put(folder)
                self.busy = None

    def _put(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        try:
            names = sorted(read_manifest(folder)["files"])
            for name in (*names, MANIFEST):
                persistently(partial(self._copy, folder / name, f"{target}/{name}"), name)
        except Exception as error:  # any storage has errors of its own: reported, never silent
            self._tell(f"{self.url}: {folder.name} was not copied: {type(error).__name__}: {error}")

    def _copy(self, file: Path, target: str) -> None:
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), target)
        self._files.invalidate_cache()
        size = self._files.info(target)["size"]
        if size != file.stat().st_size:
            raise OSError(f"{size} bytes arrived of {file.stat().st_size}")


def fetch(url: str, checkpoints: Path, digest: str) -> Path | None:
    """Bring the newest complete copy into a run's folder of checkpoints; None if there is none.

    A copy that does not arrive as its manifest says is left out for an older one.

    Raises:
        UserError: see `Copies`; or the copies are of a run with another configuration than that of
            `digest`.
        StorageError: see `storage.persistently`.
    """
    files, root = open_storage(url, _KEY)
    for name in persistently(lambda: _steps(files, root), url):
        temporary = checkpoints / f"{name}{TEMPORARY}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _get_all(files, f"{root}/{name}", temporary, digest, f"{_KEY}={url}: {name}")
        except UserError:
            raise
        except (FileNotFoundError, ValueError):
            continue  # not complete there: its manifest comes last
        finally:
            if problem(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_dir():
            shutil.rmtree(checkpoints / name, ignore_errors=True)  # damaged, or it had been taken
            return temporary.rename(checkpoints / name)
    return None


def _steps(files: Any, root: str) -> list[str]:
    """Names of the copies, newest first."""
    files.invalidate_cache()
    try:
        found = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    return sorted((name for name in found if name.startswith("step-")), reverse=True)


def _get_all(files: Any, source: str, target: Path, digest: str, what: str) -> None:
    """The files of one copy, as its manifest lists them."""

    def get(name: str) -> None:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{source}/{name}", str(path))
        size = files.info(f"{source}/{name}")["size"]
        if size != path.stat().st_size:
            raise OSError(f"{path.stat().st_size} bytes came instead of {size}")

    persistently(partial(get, MANIFEST), f"{source}/{MANIFEST}")
    manifest = read_manifest(target)
    if manifest["digest"] != digest:
        shutil.rmtree(target)
        raise UserError(
            f"{what} is of a run with another configuration; choose another address, or resume "
            "with the configuration it was saved with"
        )
    for name in manifest["files"]:
        persistently(partial(get, name), f"{source}/{name}")
