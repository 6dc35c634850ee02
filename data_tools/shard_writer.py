"""Tars of one shard folder with their lists and Energon's index; appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.manifest import Row
from data_tools.shard_rows import Made, Options
from mmssl.data.folders import DATASET_YAML, MANIFEST
from mmssl.data.integrity import PROFILE, canonical
from mmssl.data.remote import META_FOLDER
from mmssl.files import sha256
from mmssl.types import UserError

QUARANTINE = "quarantine.jsonl"
MAX_SHARDS = 10_000


class ShardWriter:
    """Tars of one folder, filled in the order of the rows."""

    def __init__(self, folder: Path, name: str, options: Options) -> None:
        self._folder, self._name, self._options = folder, name, options
        self._open: BinaryIO | None = None
        self._samples = 0
        self._seconds = {"audio": 0.0, "video": 0.0}
        self._captions = 0
        self._keys: dict[str, Row] = {}
        self.shards: list[dict[str, Any]] = []
        self.quarantine: list[dict[str, Any]] = []
        self.total = 0

    def add(self, made: Made) -> None:
        """Append one sample, or note why its row is left out."""
        if not made.reason and made.key in self._keys:
            twin = self._keys[made.key]
            made = Made(made.row, reason="duplicate", message=f"same clip as row {twin.index}")
        if made.reason:
            self.quarantine.append(_quarantined(made))
            return
        self._keys[made.key] = made.row
        block = _tar_block(made)
        size = self._file.tell() if self._samples else 0
        full = self._samples >= self._options.shard_samples
        if self._samples and (full or size + len(block) > self._options.shard_mb * 1e6):
            self._finish_shard()
        self._file.write(block)
        self._samples += 1
        self.total += 1
        for modality, seconds in made.seconds:
            self._seconds[modality] += seconds
        self._captions += made.captions

    @property
    def _shard_path(self) -> Path:
        return self._folder / f"{self._name}-{len(self.shards):06d}.tar"

    @property
    def _file(self) -> BinaryIO:
        if self._open is None:
            self._open = self._shard_path.open("wb")
        return self._open

    def _finish_shard(self) -> None:
        if self._open is None:
            return
        end = self._open.tell() + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        self._open.write(bytes(end - self._open.tell() + -end % tarfile.RECORDSIZE))
        os.fsync(self._open.fileno())
        self._open.close()
        path = self._shard_path
        self.shards.append(
            {
                "name": path.name,
                "samples": self._samples,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "seconds": {m: round(s, 3) for m, s in self._seconds.items()},
                "captions": self._captions,
            }
        )
        if len(self.shards) >= MAX_SHARDS:
            raise UserError(f"more than {MAX_SHARDS} shards; raise --shard-mb or --shard-samples")
        self._open, self._samples, self._captions = None, 0, 0
        self._seconds = {"audio": 0.0, "video": 0.0}

    def close(self) -> None:
        """Finish the last shard and write the lists."""
        self._finish_shard()
        tree = {"profile": PROFILE, "samples": self.total, "shards": self.shards}
        (self._folder / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n")
        if self.quarantine:
            lines = b"".join(canonical(entry) + b"\n" for entry in self.quarantine)
            (self._folder / QUARANTINE).write_bytes(lines)


def _quarantined(made: Made) -> dict[str, Any]:
    row = made.row
    return {
        "index": row.index,
        "where": row.where,
        "media": None if row.media is None else str(row.media),
        "reason": made.reason,
        "message": made.message,
    }


def _tar_block(made: Made) -> bytes:
    """The members of one sample as they stand in a tar: fixed owner, time and mode."""
    parts: list[bytes] = []
    for name, data in made.members:
        info = tarfile.TarInfo(f"{made.key}.{name}")
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(parts)


def build_index(folder: Path, names: Sequence[str], workers: int) -> None:
    """Energon's index, made by its own code; then our fixed dataset.yaml."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder,
            list(names),
            split_parts_patterns=[("train", ".*")],
            workers=min(workers, len(names)),
        )
    (folder / META_FOLDER / "dataset.yaml").write_text(DATASET_YAML)


def install(partial: Path, target: Path, overwrite: bool) -> bool:
    """Move a finished folder to its place; returns whether the same shards were there already."""
    if not target.exists():
        os.replace(partial, target)
        return False
    if _same(partial, target):
        return True
    if (target / MANIFEST).exists() and not overwrite:
        raise UserError(
            f"{target}: holds other shards; pass --overwrite to replace them, or choose another "
            "output"
        )
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old)
    return False


def _same(partial: Path, target: Path) -> bool:
    files = [target / MANIFEST, target / META_FOLDER / "index.sqlite"]
    if not all(path.is_file() for path in files):
        return False
    if (partial / MANIFEST).read_bytes() != (target / MANIFEST).read_bytes():
        return False
    names = [p.name for p in partial.iterdir() if p.suffix == ".tar"]
    return all(
        (target / n).is_file() and (target / n).stat().st_size == (partial / n).stat().st_size
        for n in names
    )
