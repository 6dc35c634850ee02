"""Shard folders of tiny samples for tests of damage: random bytes stand for media."""

from __future__ import annotations

import io
import json
import random
import shutil
import sqlite3
import struct
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

from data_tools.shard_writer import build_index
from mmssl.data import energon, samples
from mmssl.data.encode import BadSampleGuard
from mmssl.data.folders import read_manifest
from mmssl.data.guarded import encode_guarded, to_sample
from mmssl.data.integrity import Ledger, Quarantine, seal
from mmssl.files import sha256

BLOCK = 512
Fields = dict[str, bytes]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """Members as they stand in a tar, without its end."""
    sink = io.BytesIO()
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        sink.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
    return sink.getvalue()


def write_folder(folder: Path, shards: int, each: int, seed: int) -> dict[str, Fields]:
    """A folder as make_shards leaves it; fields by key, in order."""
    random_ = random.Random(seed)
    folder.mkdir(parents=True)
    known: dict[str, Fields] = {}
    listed = []
    for s in range(shards):
        block = b""
        for n in range(s * each, (s + 1) * each):
            key = f"k{n:03d}-{random_.randrange(1 << 32):08x}-0"
            # few sizes, so that parts of samples often fit into the places of others
            media = random_.randbytes(random_.choice([200, 700, 1400]))
            fields = {"mp4": media, "txt": f"caption {n}".encode()}
            caption = f"clip number {n} shows a moving pattern"
            record = {"key": key, "source": f"s{n}", "index": n, "has": ["text"]}
            fields["json"] = seal(record | {"captions": [caption], "meta": {}}, fields)
            known[key] = fields
            block += tar_of([(f"{key}.{name}", data) for name, data in fields.items()])
        path = folder / f"shard-{s:06d}.tar"
        path.write_bytes(block + bytes(2 * BLOCK))
        listed.append(path)
    write_manifest(folder, listed, [each] * shards)
    build_index(folder, [p.name for p in listed], 1)
    return known


def write_manifest(folder: Path, tars: list[Path], counts: list[int]) -> None:
    rows = [
        {"name": p.name, "samples": n, "bytes": p.stat().st_size, "sha256": sha256(p)}
        for p, n in zip(tars, counts, strict=True)
    ]
    (folder / "manifest.json").write_text(json.dumps({"shards": rows}))


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def offsets(tar: Path) -> list[int]:
    raw = tar.with_suffix(".tar.idx").read_bytes()
    return list(struct.unpack(f"<{len(raw) // 8}Q", raw[: len(raw) // 8 * 8]))


def write_offsets(tar: Path, places: list[int]) -> None:
    tar.with_suffix(".tar.idx").write_bytes(struct.pack(f"<{len(places)}Q", *places))


def listed_keys(folder: Path) -> list[Any]:
    """What index.sqlite says of every place; the error where it says nothing."""
    path = folder / ".nv-meta" / "index.sqlite"
    found: list[Any] = []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
        base.text_factory = bytes
        for s, tar in enumerate(sorted(folder.glob("*.tar"))):
            for n in range(
                json.loads((folder / ".nv-meta/.info.json").read_text())["shard_counts"][tar.name]
            ):
                try:
                    query = (
                        "SELECT sample_key FROM samples WHERE tar_file_id = ? AND sample_index = ?"
                    )
                    found.append(base.execute(query, (s, n)).fetchone())
                except (sqlite3.Error, UnicodeDecodeError) as error:
                    found.append(type(error))
    return found


def read_all(
    folder: str | Path, max_bytes: int = 1 << 27
) -> tuple[list[tuple[str, Fields]], Ledger]:
    """Every sample the reader lets through, with its fields; and what it counted."""
    read_manifest(folder)
    with energon.quiet():
        config = energon.worker_config(0, 1, 0, 0)
        reader = energon.Shards(folder, config, False, max_bytes).reader()
    guard = BadSampleGuard(1.0, Ledger(), Quarantine())
    good: list[tuple[str, Fields]] = []

    def encode(sample: Any) -> Any:
        samples.read(sample)
        good.append((sample.key, dict(sample.fields)))
        return sample

    for index in range(len(reader)):
        crude = reader[index]
        encode_guarded(encode, guard, to_sample(crude), crude)
    return good, guard.ledger
