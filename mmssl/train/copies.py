"""Checkpoints at a second location, e.g. object storage: written meanwhile, fetched when needed.

    URL/step-00000100/...     the files of the checkpoint; its manifest comes last

Any address that fsspec knows: s3://bucket/path (with the extra `s3`), gs://, a mounted folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mmssl.train.commit import MANIFEST, TEMPORARY, problem, read_manifest
from mmssl.types import UserError


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
        self._files, self._root = _open(self.url)
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
                self._files.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(folder / name), f"{target}/{name}")
        except Exception as error:  # any storage has errors of its own: reported, never silent
            self._tell(f"{self.url}: {folder.name} was not copied: {type(error).__name__}: {error}")


def fetch(url: str, checkpoints: Path, digest: str) -> Path | None:
    """Bring the newest complete copy into a run's folder of checkpoints; None if there is none.

    A copy that does not arrive as its manifest says is left out for an older one.

    Raises:
        UserError: see `Copies`; or the copies are of a run with another configuration than that of
            `digest`.
    """
    files, root = _open(url.rstrip("/"))
    if not files.isdir(root):
        return None
    names = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
    for name in sorted((n for n in names if n.startswith("step-")), reverse=True):
        if not files.exists(f"{root}/{name}/{MANIFEST}"):
            continue
        temporary = checkpoints / f"{name}{TEMPORARY}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files.get_file(f"{root}/{name}/{MANIFEST}", str(temporary / MANIFEST))
        if read_manifest(temporary)["digest"] != digest:
            shutil.rmtree(temporary)
            raise UserError(
                f"train.copy_to={url}: {name} is of a run with another configuration; choose "
                "another address, or resume with the configuration it was saved with"
            )
        files.get(f"{root}/{name}/", f"{temporary}/", recursive=True)
        if not problem(temporary):
            shutil.rmtree(checkpoints / name, ignore_errors=True)  # damaged, or it had been taken
            return temporary.rename(checkpoints / name)
        shutil.rmtree(temporary)
    return None


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"train.copy_to={url}: cannot be opened: {error}") from error
    return files, str(root)
