"""Reads every byte of shard folders and compares it with what was promised.

    python -m data_tools.check_shards FOLDER... [--decode]

Checked: sha256, size and sample count of each tar, and that no other tars lie there; that the
members of a sample stand together; keys, unique over all folders; CRC32C of every member and of the
json; row numbers (unique, ascending); that the media has the streams that `has` names; Energon's
offset files, and the place of every sample and member in its index. The exit status is 1 if
anything is damaged.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import struct
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import transcode
from mmssl.data import media, samples
from mmssl.data.folders import Shard, read_manifest
from mmssl.data.integrity import DamagedSampleError, valid_key
from mmssl.data.media import Limits
from mmssl.data.remote import META_FOLDER
from mmssl.files import sha256
from mmssl.types import Sample, UserError

INDEX = f"{META_FOLDER}/index.sqlite"


@dataclass
class Findings:
    """What was seen in one folder; damages are (shard, place, message)."""

    folder: Path
    samples: int = 0
    audio: int = 0
    video: int = 0
    text: int = 0
    damages: list[tuple[str, str, str]] = field(default_factory=list)

    def damage(self, shard: str, place: str, message: str) -> None:
        """Note one damage."""
        self.damages.append((shard, place, message))


@dataclass
class Place:
    """Where a sample lies in its tar, in bytes: its headers and its members' contents."""

    key: str
    start: int
    end: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def check_folder(
    folder: str | Path, decode: bool = False, others: dict[str, str] | None = None
) -> Findings:
    """Check one folder of shards.

    Args:
        folder: a folder with manifest.json.
        decode: also decode all media.
        others: keys of folders that were checked before, and where; this one's are added.

    Raises:
        UserError: the folder as a whole cannot be read (see `folders.read_manifest`).
    """
    folder = Path(folder)
    shards = read_manifest(folder)
    findings = Findings(folder)
    keys = {} if others is None else others
    wrong: Counter[str] = Counter()
    last_index = -1
    for number, shard in enumerate(tqdm(shards, desc=folder.name, unit="shard", disable=None)):
        places: list[Place] = []
        for place, fields in _samples(folder / shard.name, shard.name, findings):
            key = place.key
            places.append(place)
            if key in keys:
                findings.damage(shard.name, key, f"the key also stands in {keys[key]}")
            keys[key] = str(folder / shard.name)
            last_index = _check_sample(shard.name, key, fields, last_index, decode, findings)
        _check_tar(folder, shard, places, findings)
        wrong += _wrong_entries(folder / INDEX, number, places)
    for stray in sorted({p.name for p in folder.glob("*.tar")} - {s.name for s in shards}):
        findings.damage(stray, "manifest", "not listed in manifest.json; nobody reads it")
    wrong += _foreign_entries(folder / INDEX, len(shards))
    for name, count in wrong.items():
        told = f"{count} entries of {name} differ from the tars; run make_shards again"
        findings.damage(Path(INDEX).name, "index", told if name in _COLUMNS else name)
    return findings


def _samples(path: Path, name: str, findings: Findings) -> Iterator[tuple[Place, dict[str, bytes]]]:
    """Samples of a tar in order."""
    place, fields = Place("", 0), dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, field_name = member.name.partition(".")
                file = tar.extractfile(member) if member.isfile() else None
                if file is None:
                    findings.damage(name, member.name, "not a plain file")
                    continue
                if stem != place.key and fields:
                    yield place, fields
                if stem != place.key:
                    place, fields = Place(stem, member.offset), {}
                if field_name in fields:
                    findings.damage(name, member.name, "the member stands there twice")
                fields[field_name] = file.read()
                place.members[field_name] = member.offset_data, member.size
                place.end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        findings.damage(name, place.key or "start", f"the tar breaks off: {error}")
    if fields:
        yield place, fields


def _check_sample(
    shard: str, key: str, fields: dict[str, bytes], last: int, decode: bool, findings: Findings
) -> int:
    """Check one sample; returns its row number."""
    findings.samples += 1
    if not valid_key(key):
        findings.damage(shard, key, "the key breaks the profile")
    try:
        record = samples.read(Sample(key, (), fields))
        _check_media(record, decode)
    except DamagedSampleError as error:
        findings.damage(shard, key, str(error))
        return last
    for modality in record.has:
        setattr(findings, modality, getattr(findings, modality) + 1)
    if record.index <= last:
        findings.damage(shard, key, f"row number {record.index} after {last}")
    return max(last, record.index)


def _check_media(record: samples.Record, decode: bool) -> None:
    found = {"text"} if record.texts else set()
    for data, offers in ((record.video, ("audio", "video")), (record.sound, ("audio",))):
        if data is None:
            continue
        header = transcode.verify(data, Limits()) if decode else media.probe(data)
        streams = {"audio": header.audio_streams, "video": header.video_streams}
        found |= {m for m in offers if streams[m]}
    if not record.has <= found:
        lacking = sorted(record.has - found)
        raise DamagedSampleError("missing", f"{record.key}: `has` names {lacking}, which it lacks")


def _check_tar(folder: Path, shard: Shard, places: Sequence[Place], findings: Findings) -> None:
    path = folder / shard.name
    if path.stat().st_size != shard.bytes:
        findings.damage(shard.name, "size", f"{path.stat().st_size} bytes, listed {shard.bytes}")
    if sha256(path) != shard.sha256:
        findings.damage(shard.name, "sha256", "differs from manifest.json")
    if len(places) != shard.samples:
        findings.damage(shard.name, "samples", f"{len(places)} found, {shard.samples} listed")
    index = path.with_suffix(".tar.idx")
    raw = index.read_bytes() if index.is_file() else b""
    stored = struct.unpack(f"<{len(raw) // 8}Q", raw[: len(raw) // 8 * 8])
    offsets = [*(place.start for place in places), *(place.end for place in places[-1:])]
    if len(raw) % 8 or list(stored) != offsets:
        findings.damage(index.name, "offsets", "do not fit the tar; run make_shards again")


def _wrong_entries(path: Path, tar: int, places: Sequence[Place]) -> Counter[str]:
    """How many entries about a tar differ from it, by table; or what is wrong with the database.

    Asked tar by tar: the entries of all would fill the memory.
    """
    found: dict[str, set[Any]] = {
        "samples": {
            (tar, place.key, number, place.start, place.end - place.start)
            for number, place in enumerate(places)
        },
        "sample_parts": {
            (tar, number, name, *span)
            for number, place in enumerate(places)
            for name, span in place.members.items()
        },
    }
    return _counted(path, f"tar_file_id = {tar}", found)


def _foreign_entries(path: Path, tars: int) -> Counter[str]:
    """How many entries are about no tar of the folder."""
    foreign = f"tar_file_id IS NULL OR tar_file_id NOT BETWEEN 0 AND {tars - 1}"
    return _counted(path, foreign, {name: set() for name in _COLUMNS})


def _counted(path: Path, condition: str, found: Mapping[str, set[Any]]) -> Counter[str]:
    wrong: Counter[str] = Counter()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for name, expected in found.items():
                rows = database.execute(f"SELECT {_COLUMNS[name]} WHERE {condition}")
                wrong[name] = len(expected ^ set(rows))
    except sqlite3.Error as error:
        wrong[f"unreadable: {error}"] = 1
    return +wrong


_COLUMNS = {
    "samples": "tar_file_id, sample_key, sample_index, byte_offset, byte_size FROM samples",
    "sample_parts": "tar_file_id, sample_index, part_name, content_byte_offset, "
    "content_byte_size FROM sample_parts",
}


def table(findings: Sequence[Findings]) -> str:
    """One line per folder, then one line per damage."""
    head = ("folder", "samples", "audio", "video", "text", "damages")
    rows = [
        (str(f.folder), *map(str, (f.samples, f.audio, f.video, f.text, len(f.damages))))
        for f in findings
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [_line(row, widths) for row in (head, *rows)]
    lines += [
        f"  {f.folder / shard}: {place}: {text}"
        for f in findings
        for shard, place, text in f.damages
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


def as_json(findings: Sequence[Findings]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [{**vars(f), "folder": str(f.folder)} for f in findings]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.check_shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--decode", action="store_true", help="also decode all media")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    try:
        keys: dict[str, str] = {}
        findings = [check_folder(folder, args.decode, keys) for folder in args.folders]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(findings)) if args.json else table(findings))
    return 1 if any(f.damages for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
