"""R12 for reading: hostile archives. Nothing outside the folder is read, run or written.

One sample of a folder is replaced by hostile members, with an index that fits; it must be refused
and counted, all others must be delivered once, no file may appear or change, and memory may grow by
200 MB at most. Hostile lists of a folder must be refused before anything is read.
"""

from __future__ import annotations

import io
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from faults.folders import (
    BLOCK,
    copy,
    offsets,
    read_all,
    tar_of,
    write_folder,
    write_manifest,
    write_offsets,
)
from faults.report import Outcome, collect

from mmssl.data.integrity import seal
from mmssl.types import UserError

GROWTH = 200 << 20  # bytes
EACH, AT = 6, 2  # samples per shard, and which one is replaced


def run(count: int, seed: int) -> list[Outcome]:
    """Read every hostile folder; `count`: entries of the largest archive."""
    return collect("R12", _cases(count, seed))


def _cases(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    with tempfile.TemporaryDirectory() as place:
        whole, work = Path(place) / "whole", Path(place) / "work"
        known = write_folder(whole, 2, EACH, seed)
        keys = list(known)
        hostile = {
            **_members(keys[AT]),
            f"{count} entries in one sample": lambda: _entries(keys[AT], count),
        }
        for what, block in hostile.items():
            copy(whole, work)
            yield what, _refused(work, keys, block(), Path(place))
        yield "a sample of a gigabyte", _huge(copy(whole, work), keys, Path(place))
        copy(whole, work)
        yield "index.sqlite that computes for ever", _endless_index(work, keys, Path(place))
        for what, change in _lists().items():
            copy(whole, work)
            change(work)
            try:
                read_all(work)
                yield what, False
            except UserError:
                yield what, not (work / "pwned").exists()


def _watched(read: Callable[[], bool], root: Path) -> bool:
    """Whether reading keeps to what it may, and leaves every file as it was."""
    files = _files(root)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmHWM")
    held = read()
    return held and _files(root) == files and _status("VmHWM") - before <= GROWTH


def _files(root: Path) -> list[tuple[str, int, int]]:
    found = [*root.rglob("*"), *Path.cwd().glob("*")]
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found if p.is_file())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _refused(folder: Path, keys: list[str], block: bytes, root: Path) -> bool:
    """Put a block at the place of a sample; whether all others, and nothing else, are read."""
    tar = sorted(folder.glob("*.tar"))[0]
    raw, places = tar.read_bytes(), offsets(tar)
    tar.write_bytes(raw[: places[AT]] + block + raw[places[AT + 1] :])
    longer = len(block) - (places[AT + 1] - places[AT])
    write_offsets(tar, places[: AT + 1] + [place + longer for place in places[AT + 1 :]])
    return _watched(lambda: _all_but_one(folder, keys), root)


def _all_but_one(folder: Path, keys: list[str], reason: str = "") -> bool:
    good, ledger = read_all(folder)
    counted = sum(ledger.counts.values()) == 1 and (not reason or ledger.counts == {reason: 1})
    return [key for key, _ in good] == [*keys[:AT], *keys[AT + 1 :]] and counted


def _sealed(key: str, members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    record = {"key": key, "source": "s", "index": AT, "has": [], "captions": [], "meta": {}}
    return [
        *((f"{key}.{n}", d) for n, d in members.items()),
        (f"{key}.json", seal(record, members)),
    ]


def _special(
    key: str, change: Callable[[tarfile.TarInfo], None], data: bytes = b"x" * 600
) -> bytes:
    """A sealed sample whose first header was changed; the header's own checksum holds."""
    info = tarfile.TarInfo(f"{key}.mp4")
    info.size = len(data)
    change(info)
    body = data + bytes(-len(data) % BLOCK)
    return info.tobuf(tarfile.GNU_FORMAT) + body + tar_of(_sealed(key, {"mp4": data})[1:])


def _typed(kind: bytes, link: str = "/etc/passwd") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, link

    return change


def _field(name: str, value: object) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, name, value)


def _members(key: str) -> dict[str, Callable[[], bytes]]:
    data = {"mp4": b"x" * 600}
    plain = _sealed(key, data)
    named = {
        "absolute path": "/tmp/mmssl-pwned",
        "path that climbs out": "../../../tmp/mmssl-pwned",
        "key with capitals and spaces": "A KEY",
        "path below the folder": f"sub/{key}",
    }
    types = {
        "symbolic link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "character device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE,
        "named pipe": tarfile.FIFOTYPE,
        "directory": tarfile.DIRTYPE,
        "sparse member of 100 GB": tarfile.GNUTYPE_SPARSE,
        "long name": tarfile.GNUTYPE_LONGNAME,
        "pax header": tarfile.XHDTYPE,
        "global pax header": tarfile.XGLTYPE,
        "unknown type": b"Z",
    }
    cases: dict[str, Callable[[], bytes]] = {}
    for what, name in named.items():
        cases[what] = lambda name=name: tar_of(_sealed(name, data))
    for what, kind in types.items():
        cases[what] = lambda kind=kind: _special(key, _typed(kind))
    sizes = {"a byte": 1, "8 GB": 8 << 30, "8 EB": 8 << 60, "-512 bytes": -512}
    for what, size in sizes.items():
        cases[f"member that claims {what}"] = lambda size=size: _special(key, _field("size", size))
    cases["sparse member of 100 GB"] = lambda: _sparse(key)
    cases["member twice, with other bytes"] = lambda: tar_of([(f"{key}.mp4", b"y" * 600), *plain])
    cases["member twice, with the same bytes"] = lambda: tar_of([plain[0], *plain])
    cases["member of another sample"] = lambda: tar_of([*plain, ("other-key-0.txt", b"x")])
    cases["member named like a field of ours"] = lambda: tar_of(
        _sealed(key, {"__mmssl_error__": b""})
    )
    cases["member that json does not list"] = lambda: tar_of(
        [*plain, (f"{key}.pkl", b"cos\nsystem\n.")]
    )
    return cases


def _sparse(key: str) -> bytes:
    """GNU's old sparse format: one hole as long as the file."""
    info = tarfile.TarInfo(f"{key}.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2
    header[483:495] = (100 << 30).to_bytes(12, "big")
    header[483] |= 0x80  # base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar_of(_sealed(key, {"mp4": b""})[1:])


def _entries(key: str, count: int) -> bytes:
    """A sample of as many empty members as the count says."""
    template = bytearray(tar_of([(f"{key}.{0:08d}", b"")]))
    sink = io.BytesIO()
    for n in range(count):
        first = len(key) + 1
        template[first : first + 8] = b"%08d" % n
        template[148:156] = b" " * 8
        template[148:156] = b"%06o\0 " % sum(template)
        sink.write(template)
    return sink.getvalue()


def _huge(folder: Path, keys: list[str], root: Path) -> bool:
    """A member of 1 GB (a hole on the disk), listed and sealed like any other."""
    tar = sorted(folder.glob("*.tar"))[0]
    places = offsets(tar)
    raw, size = tar.read_bytes(), 1 << 30
    with tar.open("wb") as file:
        info = tarfile.TarInfo(f"{keys[AT]}.mp4")
        info.size = size
        file.write(raw[: places[AT]] + info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(size, os.SEEK_CUR)
        rest = tar_of(_sealed(keys[AT], {"mp4": b""})[1:])
        file.write(rest + raw[places[AT + 1] :])
    longer = BLOCK + size + len(rest) - (places[AT + 1] - places[AT])
    write_offsets(tar, places[: AT + 1] + [place + longer for place in places[AT + 1 :]])
    return _watched(lambda: _all_but_one(folder, keys, "bomb"), root)


def _endless_index(folder: Path, keys: list[str], root: Path) -> bool:
    """A view in the place of the table: every look-up would go on for ever."""
    path = folder / ".nv-meta" / "index.sqlite"
    path.unlink()
    with closing(sqlite3.connect(path)) as base:
        base.execute(
            "CREATE VIEW samples AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            " SELECT 0 AS tar_file_id, i AS sample_index, 'x' AS sample_key FROM n WHERE i < 0"
        )
        base.commit()

    def read() -> bool:
        good, ledger = read_all(folder)
        return [key for key, _ in good] == keys and ledger.counts == {"index": 2}

    return _watched(read, root)


def _lists() -> dict[str, Callable[[Path], object]]:
    meta = Path(".nv-meta")
    braces = "split_parts: {train: ['shard-{000000..999999}.tar']}\nexclude: []\n"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )

    def url(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("shard-000000.tar", "pipe:touch pwned"))

    def outside(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("shard-000000", "../whole/shard-000000"))

    def another(name: str, text: str) -> Callable[[Path], object]:
        return lambda folder: (folder / meta / name).write_text(text)

    def fewer(folder: Path) -> None:
        write_manifest(folder, sorted(folder.glob("*.tar"))[:1], [EACH])

    return {
        "dataset.yaml that names another class": another(
            "dataset.yaml", "__module__: os\n__class__: system\ncommand: touch pwned\n"
        ),
        "dataset.yaml with a line more": another(
            "dataset.yaml", "__module__: megatron.energon\n__class__: CrudeWebdataset\nx: 1\n"
        ),
        "shard that is a command": url,
        "shard outside the folder": outside,
        "split.yaml that expands to a million shards": another("split.yaml", braces),
        "split.yaml that expands to a billion items": another("split.yaml", bomb),
        "split.yaml that names a shard twice": another(
            "split.yaml",
            "split_parts: {train: [shard-000000.tar, shard-000000.tar]}\nexclude: []\n",
        ),
        "split.yaml that leaves a sample out": another(
            "split.yaml",
            "split_parts: {train: ['shard-{000000..000001}.tar']}\nexclude: [shard-000000.tar/0]\n",
        ),
        "split.yaml with a Python object": another(
            "split.yaml", "split_parts: !!python/object/apply:os.system ['touch pwned']\n"
        ),
        "manifest.json that lists fewer shards": fewer,
    }
