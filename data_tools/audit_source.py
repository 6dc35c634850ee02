"""Where an audit reads clips from: shards, or the rows of manifests and folders of media."""

from __future__ import annotations

import hashlib
import json
import stat
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from data_tools.manifest import Row, find_manifests, read_rows
from data_tools.shard_rows import sample_key
from mmssl.data import energon, samples
from mmssl.data.folders import MANIFEST, read_manifest
from mmssl.data.guarded import intact
from mmssl.data.integrity import DamagedSampleError, canonical
from mmssl.data.samples import AUDIO_FIELDS
from mmssl.specs import DataSpec
from mmssl.storage import is_address
from mmssl.types import Sample

MAX_BYTES = 2_000_000_000  # of one file


@dataclass(frozen=True)
class Item:
    """One clip.

    key: of its sample in shards, existing ones or those that make_shards would make of the row.
    part: its split. fields, job: see `audit_clip.measure`.
    """

    key: str
    part: str
    source: str
    captions: tuple[str, ...] = ()
    language: str = ""
    licence: str = ""
    fields: dict[str, bytes] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)

    def sample(self) -> Sample:
        """What `audit_clip.measure` takes."""
        return Sample(self.key, (), {**self.fields, "job": canonical(self.job)})


class Source(Protocol):
    """Clips by number; digest: a hash of what they are."""

    name: str
    digest: str

    def __len__(self) -> int:
        """How many there are."""

    def where(self, number: int) -> str:
        """Names a clip for a user, whatever is wrong with it."""

    def item(self, number: int) -> Item:
        """A clip.

        Raises:
            DamagedSampleError: it cannot be read.
            StorageError: the storage failed; the clip may be a good one.
        """


def open_source(path: str) -> Source:
    """Shards (a folder, its address, or a folder of such parts), a manifest, a folder of media.

    Raises:
        UserError: nothing of that kind, or damaged lists.
    """
    root = Path(path)
    if is_address(path) or (root / MANIFEST).is_file():
        return Shards(path, [path])
    parts = sorted(str(p.parent) for p in root.glob(f"*/{MANIFEST}"))
    return Shards(path, parts) if parts else Rows(path)


class Shards:
    """Samples of one or several shard folders."""

    def __init__(self, name: str, folders: Sequence[str]) -> None:
        """Check the folders' lists."""
        self.name = name
        self._parts = [Path(folder).name if len(folders) > 1 else "" for folder in folders]
        lists = [read_manifest(folder) for folder in folders]
        self.digest = _digest([[s.name, s.samples, s.sha256] for part in lists for s in part])
        self._ends = list(accumulate(sum(s.samples for s in part) for part in lists))
        with energon.quiet():
            config = energon.worker_config(0, 1, 0, 0)
            sets = [energon.Shards(f, config, False, DataSpec().max_bytes) for f in folders]
        self._readers = [each.reader() for each in sets]

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, number: int) -> tuple[int, int]:
        part = bisect_right(self._ends, number)
        return part, number - (self._ends[part - 1] if part else 0)

    def where(self, number: int) -> str:
        """Folder and number of the sample."""
        part, place = self._place(number)
        return f"{self._parts[part] or self.name}: sample {place}"

    def item(self, number: int) -> Item:
        """See `Source`."""
        part, place = self._place(number)
        sample = intact(self._readers[part][place])
        record = samples.read(sample)
        tree = json.loads(sample.fields["json"])
        media = {"video": record.video, "sound": record.sound}
        return Item(
            record.key,
            self._parts[part],
            record.source,
            tuple(record.texts) if "text" in record.has else (),
            str(tree.get("language", "")),
            str(tree.get("licence", "")),
            {name: data for name, data in media.items() if data is not None},
            {"has": sorted(record.has), "start": 0.0, "end": None},
        )


class Rows:
    """Rows of manifests, or media files of a folder."""

    def __init__(self, name: str) -> None:
        """Read the rows."""
        self.name = name
        self.rows = [row for path in find_manifests(Path(name)) for row in read_rows(path)]
        facts = [[r.where, str(r.media), r.start_s, r.end_s, _texts(r)] for r in self.rows]
        self.digest = _digest(facts)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, number: int) -> str:
        """The row."""
        return self.rows[number].where

    def item(self, number: int) -> Item:
        """See `Source`; `file` and `memory` are reasons, too."""
        row = self.rows[number]
        fields: dict[str, bytes] = {}
        texts = _texts(row)
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        if row.media is not None:
            try:
                if isinstance(row.media, Path):
                    _check_file(row.media)
                data = row.media.read_bytes()
            except OSError as error:
                reason = f"{row.media}: {error.strerror or error}"
                raise DamagedSampleError("file", reason) from error
            digest = hashlib.sha256(data).hexdigest()
            sound = row.media.suffix[1:].lower() in AUDIO_FIELDS
            fields = {"sound" if sound else "video": data}
        return Item(
            sample_key(row.source, digest, row.start_s),
            row.split,
            row.source,
            texts if row.has is None or "text" in row.has else (),
            row.language,
            row.licence,
            fields,
            {"has": _listed(row), "start": row.start_s, "end": row.end_s},
        )


def _texts(row: Row) -> tuple[str, ...]:
    """Captions, or what is said."""
    return row.captions or ((row.transcript.text,) if row.transcript else ())


def _listed(row: Row) -> list[str] | None:
    return None if row.has is None else sorted(row.has)


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
        raise DamagedSampleError("file", f"{path}: not a regular file")
    size = status.st_size
    if size > MAX_BYTES:
        raise DamagedSampleError("memory", f"{path}: {size} bytes, the limit is {MAX_BYTES}")


def _digest(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
