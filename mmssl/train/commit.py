"""Folders that exist completely or not at all.

All ranks write into `NAME.tmp`; when every file is on disk, rank 0 records sizes and CRC32C in
`manifest.json` and renames the folder. A folder without a manifest, or one that its manifest does
not describe, counts as absent, whatever its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import google_crc32c

from mmssl import dist
from mmssl.types import UserError

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 22


def on_rank0(work: Callable[[], T]) -> T:
    """Do something on rank 0 only; its result, or its error, on every rank.

    Raises:
        OSError: what `work` raised, on all ranks alike, so that none waits for another.
        UserError: likewise.
    """
    value: T | None = None
    error: OSError | UserError | None = None
    if dist.rank() == 0:
        try:
            value = work()
        except (OSError, UserError) as raised:
            error = raised
    value, error = dist.broadcast_object((value, error))
    if error is not None:
        raise error
    return cast("T", value)


def commit(
    target: Path,
    write: Callable[[Path], None],
    facts: dict[str, Any],
    replace: bool = False,
) -> None:
    """Create the folder `target` from what all ranks `write`; every rank calls it.

    Args:
        target: a folder on storage that all ranks share. What stands there already and is not
            complete is replaced.
        write: called on every rank with the folder to write into; may run collectives.
        facts: entries of the manifest, besides `format_version` and `files`.
        replace: a complete folder of that name gives way, too.

    Raises:
        FileExistsError: `target` is a complete folder and `replace` is off.
        OSError: rank 0 cannot write.
    """
    temporary = target.with_name(target.name + ".tmp")
    on_rank0(lambda: _prepare(target, temporary, replace))
    write(temporary)
    dist.barrier()
    on_rank0(lambda: _seal(temporary, target, facts))


def problem(folder: Path, content: bool = True) -> str:
    """What keeps a folder from being complete, or an empty string.

    Args:
        folder: a committed folder.
        content: also read every file and compare its CRC32C.
    """
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"{folder / MANIFEST}: format_version {manifest.get('format_version')!r} is unknown"
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != facts["size"]:
            return f"{path}: {path.stat().st_size} bytes instead of {facts['size']}"
        if content and crc32c(path) != facts["crc32c"]:
            return f"{path}: content differs from its CRC32C in {MANIFEST}"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        OSError: no such file.
        ValueError: no JSON object with a table `files` of sizes and CRCs.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError("not a manifest")
    return cast("dict[str, Any]", manifest)


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


def _prepare(target: Path, temporary: Path, replace: bool) -> None:
    if not replace and target.exists() and not problem(target):
        raise FileExistsError(f"{target} is complete already and is never rewritten")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _seal(temporary: Path, target: Path, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        _sync(path)
        name = path.relative_to(temporary).as_posix()
        files[name] = {"size": path.stat().st_size, "crc32c": crc32c(path)}
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
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
