"""Checks that stand between a shard and a training step.

No decoder notices a flipped bit and tar files carry no checksum of their payload, so every sample's
json holds the CRC32C of each other member and of itself. A damaged sample is refused with a reason
code; readers count it in a ledger and go on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import yaml

from mmssl.types import UserError

META_FOLDER = ".nv-meta"
MANIFEST = "manifest.json"
# Energon imports whatever class this file names, so it must equal this text.
DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
PROFILE = "mmssl-shards-1"

# Why a sample is left out: its place in the tar and index; its members; its media; how decoding
# ended in the child process; frame labels; anything else. A sample that
# only shows that the index is damaged is counted and read.
REASONS = (
    *("tar", "index", "key", "json", "members", "crc"),
    *("header", "bomb", "missing", "decode"),
    *("timeout", "memory", "crash", "quarantined"),
    *("labels", "error"),
)

_KEY = re.compile(r"[a-z0-9_]+(?:-[a-z0-9_]+)*")
_SHARD = re.compile(r"[a-z0-9_]+(?:-[a-z0-9_]+)*-\d{6}\.tar")
_BRACES = re.compile(r"(.+)-\{(\d{6})\.\.(\d{6})\}\.tar")
_SELF = re.compile(rb'"crc32c_self":"[0-9a-f]{8}",?')


class DamagedSampleError(ValueError):
    """A sample that must not reach training; `reason` is a short code for the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Shard:
    """One tar file as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


def crc32c(data: bytes) -> str:
    """CRC32C (Castagnoli) as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one byte string of a json object: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def seal(record: Mapping[str, Any], members: Mapping[str, bytes]) -> bytes:
    """The json member of a sample: the record, the CRC of every other member, and its own CRC."""
    sealed = {**record, "crc32c": {name: crc32c(data) for name, data in members.items()}}
    sealed["crc32c_self"] = crc32c(canonical(sealed))
    return canonical(sealed)


def unseal(key: str, fields: Mapping[str, bytes]) -> dict[str, Any]:
    """Check every member of a sample and return its json record.

    Raises:
        DamagedSampleError: json missing or unreadable (`json`), another sample's json (`key`), a
            member missing or not listed (`members`), or wrong bytes (`crc`).
    """
    record = read_record(key, fields)
    listed = record.get("crc32c")
    members = {name: data for name, data in fields.items() if name != "json"}
    if not isinstance(listed, dict) or set(listed) != set(members):
        raise DamagedSampleError(
            "members", f"{key}: the shard holds {sorted(members)}, the json lists {listed!r}"
        )
    for name, data in members.items():
        if crc32c(data) != listed[name]:
            raise DamagedSampleError("crc", f"{key}.{name}: wrong CRC32C, the bytes were changed")
    return record


def read_record(key: str, fields: Mapping[str, bytes]) -> dict[str, Any]:
    """The json record of a sample, whose other members are not looked at.

    Raises:
        DamagedSampleError: as `unseal`, but for `members`.
    """
    raw = fields.get("json")
    if raw is None:
        raise DamagedSampleError("json", f"{key}: the json member is missing")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedSampleError("json", f"{key}.json: unreadable ({error})") from error
    if not isinstance(record, dict):
        raise DamagedSampleError("json", f"{key}.json: not an object")
    if not _own_crc_holds(raw, record):
        raise DamagedSampleError("crc", f"{key}.json: wrong crc32c_self, the bytes were changed")
    if record.get("key") != key:
        raise DamagedSampleError("key", f"{key}: its json belongs to {record.get('key')!r}")
    return record


def _own_crc_holds(raw: bytes, record: dict[str, Any]) -> bool:
    """Our writer stores the canonical form: cutting the field out of the bytes usually suffices."""
    expected = record.get("crc32c_self")
    if crc32c(_SELF.sub(b"", raw, count=1)) == expected:
        return True
    rest = {name: value for name, value in record.items() if name != "crc32c_self"}
    try:
        return crc32c(canonical(rest)) == expected
    except ValueError:  # NaN or Infinity: not json, and never written by us
        return False


def valid_key(key: str) -> bool:
    """Whether a sample key keeps to the profile: [a-z0-9_] groups joined by hyphens."""
    return len(key) <= 200 and _KEY.fullmatch(key) is not None


def read_manifest(folder: Path) -> list[Shard]:
    """The shards of a prepared folder, checked against Energon's own lists.

    Raises:
        UserError: no such folder, not prepared by make_shards, or files that disagree.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such shard folder; make one with data_tools.make_shards")
    if not path.is_file():
        raise UserError(_no_manifest(folder))
    try:
        tree = json.loads(path.read_bytes())
        shards = [
            Shard(**{k: s[k] for k in ("name", "samples", "bytes", "sha256")})
            for s in tree["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({error!r}); make the shards again") from error
    _check_names(folder, shards)
    _check_energon_files(folder, shards)
    return shards


def _no_manifest(folder: Path) -> str:
    parts = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
    hint = f"; it has parts {', '.join(parts)}: name one of them" if parts else ""
    return (
        f"{folder}: no {MANIFEST}, so this is not a folder written by data_tools.make_shards{hint}"
    )


def _check_names(folder: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        if _SHARD.fullmatch(shard.name) is None:
            raise UserError(f"{folder / MANIFEST}: {shard.name!r} is no shard name")
        if not (folder / shard.name).is_file():
            raise UserError(
                f"{folder / shard.name}: missing, but {MANIFEST} lists it; restore the file"
            )


def _check_energon_files(folder: Path, shards: list[Shard]) -> None:
    meta = folder / META_FOLDER
    remedy = "run python -m data_tools.make_shards again"
    for name in ("dataset.yaml", "split.yaml", ".info.json", "index.sqlite"):
        if not (meta / name).is_file():
            raise UserError(f"{meta / name}: missing; {remedy}")
    if (meta / "dataset.yaml").read_text() != DATASET_YAML:
        raise UserError(
            f"{meta / 'dataset.yaml'}: differs from the only accepted text; a data set may not "
            f"choose the code that reads it; {remedy}"
        )
    try:
        counts = json.loads((meta / ".info.json").read_bytes())["shard_counts"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta / '.info.json'}: unreadable ({error!r}); {remedy}") from error
    names = [shard.name for shard in shards]
    # The order numbers the shards in index.sqlite.
    if list(counts.items()) != [(shard.name, shard.samples) for shard in shards]:
        raise UserError(f"{meta / '.info.json'}: lists other shards than {MANIFEST}; {remedy}")
    if _split_names(meta / "split.yaml", max_names=len(names)) != names:
        raise UserError(f"{meta / 'split.yaml'}: lists other shards than {MANIFEST}; {remedy}")


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


class Ledger:
    """Counts what was skipped, and appends one json line each if it has a path.

    Several processes may append to one file: a line is written by a single call in append mode.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.counts: dict[str, int] = {}
        self._told: dict[str, int] = {}

    def fresh(self) -> dict[str, int]:
        """Counts since the last call, by reason."""
        told, self._told = self._told, dict(self.counts)
        return {k: n - told.get(k, 0) for k, n in self.counts.items() if n > told.get(k, 0)}

    def add(self, reason: str, **context: Any) -> None:
        """Count one skipped sample under its reason code, one of `REASONS`."""
        assert reason in REASONS, reason
        self.counts[reason] = self.counts.get(reason, 0) + 1
        _append(self.path, {"reason": reason, **context})


class Quarantine:
    """Keys of samples that killed or stalled a process: they are not tried again.

    The list is kept in RUN/quarantine*.jsonl, one file per rank, and read whole, so that a resumed
    run leaves the same samples out; who removes a line has its sample tried again.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.keys: set[str] = set()
        self.read()

    def read(self) -> None:
        """Take in what this and other processes have listed."""
        for file in self.path.parent.glob("quarantine*.jsonl") if self.path else ():
            for line in file.read_bytes().splitlines():
                try:
                    self.keys.add(str(json.loads(line)["key"]))
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a full disk: the sample is tried, and listed, again

    def add(self, key: str, reason: str, message: str) -> None:
        """List a sample."""
        self.keys.add(key)
        _append(self.path, {"key": key, "reason": reason, "message": message})


def _append(path: Path | None, line: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(canonical(line) + b"\n")
    except OSError as error:  # a full disk must not end the reading; the counts are kept anyway
        print(f"mmssl: {path} cannot be written: {error}", file=sys.stderr)
