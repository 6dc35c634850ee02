"""Folders of shards, on this machine or in object storage, and the checks before one is read."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from mmssl.data.remote import META_FILES, META_FOLDER, RemoteFolder, remote_folder
from mmssl.storage import is_address
from mmssl.types import UserError

MANIFEST = "manifest.json"
# Energon imports whatever class this file names, so it must equal this text.
DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"

_SHARD = re.compile(r"[a-z0-9_]+(?:-[a-z0-9_]+)*-\d{6}\.tar")
_BRACES = re.compile(r"(.+)-\{(\d{6})\.\.(\d{6})\}\.tar")
_REMEDY = "run python -m data_tools.make_shards again"


@dataclass(frozen=True)
class Shard:
    """One tar file as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Tar(Protocol):
    """A tar that is read in stretches."""

    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` to `end`; fewer where the file ends before."""

    def close(self) -> None:
        """Let go of the file."""


class _LocalTar:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - start, start)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class ShardFolder:
    """A folder as the user names it; `path` is where its files are, the tars aside if `remote`."""

    name: str
    path: Path
    remote: RemoteFolder | None

    def open(self, tar: str) -> Tar:
        """A tar by its name."""
        return self.remote.open(tar) if self.remote else _LocalTar(self.path / tar)

    def has(self, tar: str) -> bool:
        """Whether there is such a tar."""
        return tar in self.remote.tars if self.remote else (self.path / tar).is_file()


def find_folder(folder: str | Path) -> ShardFolder:
    """A folder by its path, or by an address that fsspec knows, e.g. s3://bucket/folder.

    Raises:
        UserError: no such folder.
        StorageError: see `storage.persistently`.
    """
    if is_address(folder):
        remote = remote_folder(str(folder).rstrip("/"))
        return ShardFolder(remote.address, remote.path, remote)
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such shard folder; make one with data_tools.make_shards")
    return ShardFolder(str(folder), Path(folder), None)


def read_manifest(folder: str | Path) -> list[Shard]:
    """The shards of a prepared folder, checked against Energon's own lists.

    Raises:
        UserError: no such folder, not prepared by make_shards, or files that disagree.
    """
    found = find_folder(folder)
    path = found.path / MANIFEST
    if not path.is_file():
        raise UserError(_no_manifest(found))
    try:
        tree = json.loads(path.read_bytes())
        shards = [
            Shard(**{k: s[k] for k in ("name", "samples", "bytes", "sha256")})
            for s in tree["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{found.name}/{MANIFEST}: unreadable ({error!r}); make the shards again"
        ) from error
    _check_names(found, shards)
    _check_energon_files(found, shards)
    return shards


def _no_manifest(folder: ShardFolder) -> str:
    parts = sorted(p.parent.name for p in folder.path.glob(f"*/{MANIFEST}"))
    hint = f"; it has parts {', '.join(parts)}: name one of them" if parts else ""
    return (
        f"{folder.name}: no {MANIFEST}, so this is not a folder written by "
        f"data_tools.make_shards{hint}"
    )


def _check_names(folder: ShardFolder, shards: list[Shard]) -> None:
    for shard in shards:
        if _SHARD.fullmatch(shard.name) is None:
            raise UserError(f"{folder.name}/{MANIFEST}: {shard.name!r} is no shard name")
        if not folder.has(shard.name):
            raise UserError(
                f"{folder.name}/{shard.name}: missing, but {MANIFEST} lists it; restore the file"
            )


def _check_energon_files(folder: ShardFolder, shards: list[Shard]) -> None:
    meta, shown = folder.path / META_FOLDER, f"{folder.name}/{META_FOLDER}"
    for name in META_FILES:
        if not (meta / name).is_file():
            raise UserError(f"{shown}/{name}: missing; {_REMEDY}")
    if (meta / "dataset.yaml").read_text() != DATASET_YAML:
        raise UserError(
            f"{shown}/dataset.yaml: differs from the only accepted text; a data set may not "
            f"choose the code that reads it; {_REMEDY}"
        )
    try:
        counts = json.loads((meta / ".info.json").read_bytes())["shard_counts"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown}/.info.json: unreadable ({error!r}); {_REMEDY}") from error
    names = [shard.name for shard in shards]
    # The order numbers the shards in index.sqlite.
    if list(counts.items()) != [(shard.name, shard.samples) for shard in shards]:
        raise UserError(f"{shown}/.info.json: lists other shards than {MANIFEST}; {_REMEDY}")
    if _split_names(meta / "split.yaml", max_names=len(names)) != names:
        raise UserError(f"{shown}/split.yaml: lists other shards than {MANIFEST}; {_REMEDY}")


def _split_names(path: Path, max_names: int) -> list[str]:
    """Shards in Energon's list; it expands braces without bounds and leaves out what it is told."""
    try:
        tree = yaml.safe_load(path.read_text())
        (patterns,) = tree["split_parts"].values()
        names: list[str] = []
        for pattern in patterns if not tree["exclude"] else []:
            found = _BRACES.fullmatch(pattern)
            first, last = (int(found[2]), int(found[3])) if found else (0, 0)
            numbers = range(first, min(last, first + max_names) + 1)
            names += [f"{found[1]}-{n:06d}.tar" for n in numbers] if found else [pattern]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return names
