"""Checks that stand between a shard and a training step.

No decoder notices a flipped bit and tar files carry no checksum of their payload, so every sample's
json holds the CRC32C of each other member and of itself. A damaged sample is refused with a reason
code; readers count it in a ledger and go on.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

PROFILE = "mmssl-shards-1"

# Why a sample is left out: its place in the tar and index, or another tar there; its members; its
# media; how decoding ended in the child process; frame labels; anything else. A sample that
# only shows that the index is damaged is counted and read.
REASONS = (
    *("tar", "index", "changed", "key", "json", "members", "crc"),
    *("header", "bomb", "missing", "decode"),
    *("timeout", "memory", "crash", "quarantined"),
    *("labels", "error"),
)

_KEY = re.compile(r"[a-z0-9_]+(?:-[a-z0-9_]+)*")
_SELF = re.compile(rb'"crc32c_self":"[0-9a-f]{8}",?')


class DamagedSampleError(ValueError):
    """A sample that must not reach training; `reason` is a short code for the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def crc32c(data: bytes) -> str:
    """CRC32C (Castagnoli) as eight hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one byte string of a json object: sorted keys, no spaces, UTF-8.

    Halves of surrogate pairs, as in names of files that are not UTF-8, are escaped.
    """
    text = json.dumps(
        record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode(errors="backslashreplace")


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


class ErrorBudget:
    """Counts the bad ones among the last `window`, where a share of the whole window may be bad."""

    window = 1000

    def __init__(self, max_share: float) -> None:
        self._most = max_share * self.window
        self._recent: deque[bool] = deque(maxlen=self.window)

    def note(self, bad: bool) -> bool:
        """Count one; returns whether there are too many bad ones now."""
        self._recent.append(bad)
        return bad and sum(self._recent) > self._most

    def __str__(self) -> str:
        return f"{sum(self._recent)} of the last {len(self._recent)}"


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
