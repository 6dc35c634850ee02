"""R13: faults of object storage lose no sample, repeat none and mix none.

Shards are read from a real S3 server through a proxy that fails 10 % of the requests; then a tar
is replaced under the reader, by one that is whole and has the same size and keys.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from faults.folders import Fields, read_all, write_folder
from faults.report import Outcome, collect
from object_store import BUCKET, Proxy, proxy, server, settings

from mmssl.data import energon
from mmssl.data.reader import ERROR, REASON
from mmssl.storage import open_storage

SHARE, SHARDS, EACH = 0.1, 5, 20


def run(count: int, seed: int) -> list[Outcome]:
    """`count` GET requests at least, then a replaced object at each of the shards."""
    return collect("R13", _cases(count, seed))


def _cases(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{folder}/cache"),
        server() as port,
        settings(port),
    ):
        known = write_folder(Path(folder, "a"), SHARDS, EACH, seed)
        address = f"s3://{BUCKET}/shards"
        upload(Path(folder, "a"), address)
        with proxy(port, SHARE, seed) as failing, settings(failing.port):
            yield from _read(address, list(known.items()), failing, count)
        yield from _replaced(Path(folder), address, seed)


def upload(folder: Path, address: str) -> None:
    """A local folder to an address."""
    files, root = open_storage(address)
    files.put(f"{folder}/", f"{root}/", recursive=True)
    files.invalidate_cache()


def _read(
    address: str, known: list[tuple[str, Fields]], failing: Proxy, count: int
) -> Iterator[tuple[str, bool]]:
    """One case per failure; they count as survived if every pass gives every sample once."""
    told = failing.failed.copy()
    while failing.gets < count:
        read, ledger = read_all(address)
        held = read == known and not ledger.counts
        for kind in (failing.failed - told).elements():
            yield f"S3 request: {kind}, 10 % of them", held
        told = failing.failed.copy()
    yield f"all samples once and equal, {count} GETs or more", held


def _replaced(folder: Path, address: str, seed: int) -> Iterator[tuple[str, bool]]:
    """Every shard in turn: before it is opened, and while it is open."""
    for k in range(SHARDS):
        upload(folder / "a", address)
        with energon.quiet():
            config = energon.worker_config(0, 1, 0, 0)
            reader = energon.Shards(address, config, False, 1 << 27).reader()
        # tests of other sizes find the place of a sample by the .tar.idx that was there before
        first = reader[k * EACH] if k % 2 else {}
        name = f"shard-{k:06d}.tar"
        data = bytearray((folder / "a" / name).read_bytes())
        data[-1] ^= 1  # behind the last sample: no checksum of a sample tells
        files, root = open_storage(address)
        files.pipe_file(f"{root}/{name}", bytes(data))
        found = [reader[k * EACH + n] for n in range(1, EACH)]
        told = [crude.get(REASON) == "changed" and name in crude[ERROR] for crude in found]
        yield "object replaced under the reader", all(told) and ERROR not in first
