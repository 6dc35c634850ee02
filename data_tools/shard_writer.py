"""Tars of one shard folder with their lists and Energon's index; appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.journal import JOURNAL, SHARD, Journal
from data_tools.shard_rows import Made, Options
from mmssl.data.folders import DATASET_YAML, MANIFEST
from mmssl.data.integrity import PROFILE, ErrorBudget, canonical, crc32c
from mmssl.data.remote import META_FOLDER
from mmssl.files import sha256
from mmssl.types import UserError

QUARANTINE = "quarantine.jsonl"
DUPLICATE = "duplicate"
MAX_SHARDS = 10_000
_SYNC_S = 5.0  # what a power failure may cost; a kill costs the rows under way
BUILD = f"{META_FOLDER}/build"  # of which rows and options the folder was made


class HopelessError(UserError):
    """A build with which no rerun could go on."""


class ShardWriter:
    """Tars of one folder, filled in the order of the rows; a killed build is gone on with.

    What is known of the folder is a fold over the entries of its journal. A sample's bytes reach
    its tar before its entry does, so whatever lies behind the last entry is cut off.
    """

    def __init__(
        self, folder: Path, name: str, expected: int, options: Options, digest: str
    ) -> None:
        """Open a folder for so many rows, see `Journal`; `rows` counts those settled before."""
        self._folder, self._name, self._options = folder, name, options
        self._expected = expected
        self._open: BinaryIO | None = None
        self._keys: dict[str, int] = {}
        self._budget = ErrorBudget(options.max_bad_share)
        self.shards: list[dict[str, Any]] = []
        self.first_bad = ""
        self.total = self.bad = self.rows = self.worker_mb = 0
        self._begin_shard()
        self._journal = Journal(folder, digest, options.overwrite)
        self._journal.replay(self._replayed)
        self._drop_rest()
        self._synced = time.monotonic()

    def add(self, made: Made) -> None:
        """Append one sample, or note why its row is left out.

        Raises:
            UserError: too many rows are bad.
            HopelessError: there would be too many shards.
        """
        self.worker_mb = max(self.worker_mb, made.peak_mb)
        if not made.reason and made.key in self._keys:
            text = (
                f"same clip as row {self._keys[made.key]}; several captions of one go into one row"
            )
            made = Made(made.row, reason=DUPLICATE, message=text)
        if made.reason:
            self._commit({"bad": _quarantined(made)})
            return
        block = _tar_block(made)
        full = self._samples >= self._options.shard_samples
        if self._samples and (full or self._size + len(block) > self._options.shard_mb * 1e6):
            self._finish_shard()
        self._file.write(block)
        self._file.flush()
        entry = {
            "key": made.key,
            "index": made.row.index,
            "size": len(block),
            "crc": crc32c(block),
            "seconds": dict(made.seconds),
            "captions": made.captions,
        }
        self._commit(entry)

    def _commit(self, entry: Mapping[str, Any]) -> None:
        self._journal.add(entry)
        if self._note(entry):
            bad = entry["bad"]
            raise UserError(
                f"{self._budget} rows were bad, more than --max-bad-share = "
                f"{self._options.max_bad_share:g} of {ErrorBudget.window} allows; the last: "
                f"{bad['where']}: {bad['message']} ({bad['reason']}). The same command with a "
                "higher share goes on from here without them; if they can be mended, mend them "
                "and pass --overwrite to begin anew"
            )
        if time.monotonic() - self._synced > _SYNC_S:
            self._sync()

    def _note(self, entry: Mapping[str, Any]) -> bool:
        """Take in what an entry says; returns whether too many rows are bad."""
        if SHARD in entry:
            self.shards.append(entry[SHARD])
            self._begin_shard()
            return False
        self.rows += 1
        if "bad" in entry:
            self.bad += 1
            self.first_bad = self.first_bad or entry["bad"]["message"]
            return self._budget.note(entry["bad"]["reason"] != DUPLICATE)
        self._keys[entry["key"]] = entry["index"]
        self._samples += 1
        self.total += 1
        self._size += entry["size"]
        self._captions += entry["captions"]
        for modality, seconds in entry["seconds"].items():
            self._seconds[modality] += seconds
        return self._budget.note(False)

    def _begin_shard(self) -> None:
        self._samples = self._size = self._captions = 0
        self._seconds = {"audio": 0.0, "video": 0.0}

    @property
    def _shard_path(self) -> Path:
        return self._folder / f"{self._name}-{len(self.shards):06d}.tar"

    @property
    def _file(self) -> BinaryIO:
        if self._open is None:
            self._open = self._shard_path.open("ab")
        return self._open

    # --- what an earlier process left

    def _replayed(self, entry: Mapping[str, Any], vouched: bool) -> bool:
        """Take in an entry that the tars bear out."""
        if SHARD in entry:
            path = self._folder / entry[SHARD]["name"]
            if not _has_size(path, entry[SHARD]["bytes"]):
                raise UserError(f"{path}: changed or gone; remove {self._folder} to begin anew")
        elif "key" in entry and not vouched and not self._stored(entry):
            return False
        self._note(entry)
        return True

    def _stored(self, entry: Mapping[str, Any]) -> bool:
        if not self._shard_path.is_file():
            return False
        with self._shard_path.open("rb") as file:
            file.seek(self._size)
            block = file.read(entry["size"])
        return (len(block), crc32c(block)) == (entry["size"], entry["crc"])

    def _drop_rest(self) -> None:
        """Cut off what no entry vouches for, and what only a finished folder has."""
        kept = {shard["name"] for shard in self.shards} | {JOURNAL}
        if self._samples:
            kept.add(self._shard_path.name)
            os.truncate(self._shard_path, self._size)
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()

    # --- the ends of shards and folders

    def _sync(self) -> None:
        if self._open is not None:
            os.fsync(self._open.fileno())
        self._journal.sync()
        self._synced = time.monotonic()

    def _finish_shard(self) -> None:
        if not self._samples:
            return
        path, end = self._shard_path, 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        self._file.write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
        self._file.flush()
        self._sync()
        self._file.close()
        self._open = None
        shard = {
            "name": path.name,
            "samples": self._samples,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "seconds": {m: round(s, 3) for m, s in self._seconds.items()},
            "captions": self._captions,
        }
        self._commit({SHARD: shard})
        self._sync()
        count = len(self.shards)
        if count >= MAX_SHARDS // 100 and count * self._expected > MAX_SHARDS * self.rows:
            raise HopelessError(
                f"it would become more than {MAX_SHARDS} shards, for {count} hold {self.rows} of "
                f"{self._expected} rows; raise --shard-mb or --shard-samples"
            )

    def finish(self) -> None:
        """Finish the last shard and write the lists."""
        self._finish_shard()
        tree = {"profile": PROFILE, "samples": self.total, "shards": self.shards}
        (self._folder / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n")
        if self.bad:
            with (self._folder / QUARANTINE).open("wb") as file:
                bad = (entry["bad"] for entry in self._journal.entries() if "bad" in entry)
                file.writelines(canonical(line) + b"\n" for line in bad)

    def close(self) -> None:
        """Leave the folder to another process."""
        if self._open is not None:
            self._open.close()
        self._journal.close()


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


def finished(target: Path, digest: str) -> bool:
    """Whether a folder is the whole of this build; removes what a kill after `install` left."""
    if not (target / BUILD).is_file() or (target / BUILD).read_text() != digest:
        return False
    shards = json.loads((target / MANIFEST).read_bytes())["shards"]
    if not all(_has_size(target / shard["name"], shard["bytes"]) for shard in shards):
        return False
    _tidy(target)
    return True


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _tidy(target: Path) -> None:
    (target / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(_old(target), ignore_errors=True)


def install(partial: Path, target: Path, overwrite: bool) -> bool:
    """Move a finished folder to its place; returns whether the same shards were there already."""
    if not overwrite and _same(partial, target):
        (target / QUARANTINE).unlink(missing_ok=True)  # a row more may be bad than in that build
        for path in filter(Path.exists, (partial / QUARANTINE, partial / BUILD)):
            os.replace(path, target / path.relative_to(partial))
        shutil.rmtree(partial)
        return True
    if (target / MANIFEST).exists() and not overwrite:
        raise UserError(
            f"{target}: holds other shards; pass --overwrite to replace them with those made now, "
            f"which wait in {partial.name}, or choose another output"
        )
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
        os.replace(target, _old(target))
    os.replace(partial, target)
    _tidy(target)
    return False


def _same(partial: Path, target: Path) -> bool:
    if not all((target / name).is_file() for name in (MANIFEST, f"{META_FOLDER}/index.sqlite")):
        return False
    if (partial / MANIFEST).read_bytes() != (target / MANIFEST).read_bytes():
        return False
    tars = [p for p in partial.iterdir() if p.suffix == ".tar"]
    return all(_has_size(target / p.name, p.stat().st_size) for p in tars)
