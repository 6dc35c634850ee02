"""Folders that exist completely or not at all.

All ranks write into `NAME.tmp` and tell size and CRC32C of their files; when every file is on disk
and rank 0 finds it there as it was written, it writes `manifest.json` and renames the folder. A
folder without a manifest, or one that its manifest does not describe, counts as absent, whatever
its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmssl import dist
from mmssl.data.integrity import canonical
from mmssl.train.migrations import FORMAT_VERSION, migrated
from mmssl.types import UserError

MANIFEST, TEMPORARY = "manifest.json", ".tmp"
_SELF = "crc32c_self"
_CHUNK = 1 << 22


class NotSavedError(UserError):
    """A folder could not be written; nothing of it is left, and all else is untouched."""


class Writer:
    """The files of one rank in a folder that is being committed.

    A file that cannot be written is no reason to leave the others alone in a collective: the error
    is kept until all ranks have come to the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.error = folder, ""
        self.files: dict[str, dict[str, Any]] = {}

    def file(self, name: str, write: Callable[[Path], object]) -> None:
        """Have `write` make a file at the path it is given; nothing any more after an error."""
        path = self.folder / name
        if self.error:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            _sync(path)
            self.files[name] = {"size": path.stat().st_size, "crc32c": crc32c(path)}
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch reports a full disk as a file position that it did not expect
            self.error = f"{path}: {error}{_room(self.folder)}"

    def tensors(self, name: str, state: dict[str, Tensor], digest: str) -> None:
        """A safetensors file that names the configuration it belongs to."""

        def write(path: Path) -> None:
            save_file(state, path, metadata={"digest": digest})
            # safetensors makes files that only their owner may read
            path.chmod(path.parent.stat().st_mode & 0o666)

        self.file(name, write)


def commit(
    target: Path,
    write: Callable[[Writer], None],
    facts: dict[str, Any],
    replace: bool = False,
) -> None:
    """Create the folder `target` from what all ranks `write`; every rank calls it.

    Args:
        target: a folder on storage that all ranks share. What stands there already and is not
            complete is replaced.
        write: called on every rank; may run collectives.
        facts: entries of the manifest, besides `format_version` and `files`.
        replace: a complete folder of that name gives way, too.

    Raises:
        FileExistsError: `target` is a complete folder and `replace` is off.
        NotSavedError: a rank could not write, or rank 0 does not see what was written.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    writer = Writer(temporary)
    try:
        dist.on_rank0(lambda: _prepare(target, temporary, replace))
        try:
            write(writer)
        except OSError as error:  # told to the others, who must not wait for this rank
            writer.error = writer.error or str(error)
        written = dist.gather_objects((writer.files, writer.error))
        if errors := [error for _, error in written if error]:
            raise OSError(errors[0])
        files = {name: entry for theirs, _ in written for name, entry in theirs.items()}
        dist.on_rank0(lambda: _seal(temporary, target, {**facts, "files": files}))
    except FileExistsError:
        raise
    except OSError as error:  # the same on all ranks
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise NotSavedError(f"{target}: not saved: {error}") from error


def problem(folder: Path, every: int = 1, first: int = 0) -> str:
    """What keeps a folder from being complete, or an empty string.

    Args:
        folder: a committed folder.
        every: so many ranks share the reading: of each file they compare the size, and the CRC32C
            of every `every`-th one,
        first: from this one on.
    """
    try:
        files = read_manifest(folder)["files"]
        read = sorted(files)[first::every]
        return _mismatch(folder, files, read)
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"


def _mismatch(folder: Path, files: Mapping[str, Mapping[str, Any]], read: Collection[str]) -> str:
    """The first file that is not as listed, or an empty string; `read`: whose bytes count, too."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != facts["size"]:
            return f"{path}: {path.stat().st_size} bytes instead of {facts['size']}"
        if name in read and crc32c(path) != facts["crc32c"]:
            return f"{path}: content differs from its CRC32C in {MANIFEST}"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, in today's form.

    Raises:
        OSError: no such file.
        ValueError: no JSON object with a table `files` of sizes and CRCs, or of an unknown format.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError("not a manifest")
    found = migrated(manifest)
    if manifest["format_version"] > 1 and manifest != sealed(manifest):
        raise ValueError("its content differs from its own CRC32C")
    return found


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the CRC32C of all its other entries."""
    rest = {key: value for key, value in manifest.items() if key != _SELF}
    return {**rest, _SELF: f"{google_crc32c.value(canonical(rest)):08x}"}


def crc32c(path: Path) -> str:
    """CRC32C of a file, 8 hex digits."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            value = google_crc32c.extend(value, block)
    return f"{value:08x}"


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new one."""
    replace_file(path, text.encode())


def replace_file(path: Path, data: bytes) -> None:
    """As `write_text`, for bytes."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _is_entry(item: tuple[str, Any]) -> bool:
    name, facts = item
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(facts, dict) and facts.keys() >= {"size", "crc32c"}


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    except OSError:
        return ""


def _prepare(target: Path, temporary: Path, replace: bool) -> None:
    if not replace and target.exists() and not problem(target):
        raise FileExistsError(f"{target} is complete already and is never rewritten")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _seal(temporary: Path, target: Path, facts: dict[str, Any]) -> None:
    if damage := _mismatch(temporary, facts["files"], facts["files"]):
        raise OSError(damage)
    manifest = sealed({"format_version": FORMAT_VERSION, **facts})
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    folders = (p for p in temporary.rglob("*") if p.is_dir())
    for path in (temporary / MANIFEST, *folders, temporary):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    os.rename(temporary, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Have the kernel write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
