"""R5: damaged shards are detected, never mixed.

Files of a shard folder are damaged at random. Whatever is delivered must equal, field by field,
what was written; every sample that still stands complete where the index says must be delivered
exactly once; each other place must be counted, and so must a damaged index.
"""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.folders import (
    BLOCK,
    Fields,
    copy,
    listed_keys,
    offsets,
    read_all,
    tar_of,
    write_folder,
    write_offsets,
)
from faults.report import Outcome, collect

from data_tools.train_tokenizer import train_tokenizer
from mmssl.data.loader import train_loader
from mmssl.data.text import Tokenizer
from mmssl.specs import DataSpec, ViewSpec

SHARDS, EACH = 3, 14
LOADER_EVERY = 25  # damages after which the whole training loader reads the folder, too


def run(count: int, seed: int) -> list[Outcome]:
    """Inject `count` damages."""
    return collect("R5", _cases(count, seed))


def _cases(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        whole, work = Path(place) / "whole", Path(place) / "work"
        known = write_folder(whole, SHARDS, EACH, seed)
        train_tokenizer(whole, Path(place) / "tokenizer.model", 300)
        tokenizer = Tokenizer.load(Path(place) / "tokenizer.model")
        listed = listed_keys(whole)
        done = 0
        while done < count:
            what, damage = list(DAMAGES.items())[done % len(DAMAGES)]
            copy(whole, work)
            damage(sorted(work.glob("*.tar")), random_)
            complete = _complete(work, known)
            index_hurt = listed_keys(work) != listed or _lengths(work) != _lengths(whole)
            if len(complete) == len(known) and not index_hurt:
                continue  # the damage hit padding, or the same bytes stand there
            held = _held(work, known, complete, index_hurt)
            if done % LOADER_EVERY == 0 and complete:
                held &= _loaded(work, complete, tokenizer)
            done += 1
            yield what, held


def _held(folder: Path, known: dict[str, Fields], complete: set[str], index_hurt: bool) -> bool:
    good, ledger = read_all(folder)
    mixed = any(known.get(key) != fields for key, fields in good)
    once = Counter(key for key, _ in good) == Counter(complete)
    bad = sum(ledger.counts.values()) - (ledger.counts.get("index", 0) if index_hurt else 0)
    lost = len(known) - len(complete)
    # Damage of the index is counted as a note, or as samples that have no place any more.
    counted = bad == lost if not index_hurt else sum(ledger.counts.values()) >= max(1, lost)
    return not mixed and once and counted


def _loaded(folder: Path, complete: set[str], tokenizer: Tokenizer) -> bool:
    """One epoch of the training loader delivers the complete samples, each once."""
    data = DataSpec(train=str(folder), workers=0, max_bad_share=1.0, isolate=False)
    views = {"text": ViewSpec(modality="text", length=8)}
    loader = train_loader(data, views, 1, 0, 0, 1, tokenizer)
    seen = [next(loader).keys[0] for _ in complete]
    next(loader)  # by then all others have been met
    state = loader.state()
    rest = [next(loader).keys[0] for _ in range(5)]
    again = train_loader(data, views, 1, 0, 0, 1, tokenizer)
    again.restore(state)
    lost = SHARDS * EACH - len(complete)
    return (
        Counter(seen) == Counter(complete)
        and sum(loader.skipped.values()) >= lost
        and [next(again).keys[0] for _ in range(5)] == rest
    )


def _complete(folder: Path, known: dict[str, Fields]) -> set[str]:
    """Keys whose stretch of the tar, by the index as it is, is what was written there."""
    keys = iter(known)
    found = set()
    for tar in sorted(folder.glob("*.tar")):
        raw, places = tar.read_bytes(), offsets(tar)
        for n in range(EACH):
            key = next(keys)
            first, end = (*places[n : n + 2], 0, 0)[:2]
            # A cut may take nothing but the padding; the last byte of a sample is that of its json.
            padding = bytes(min(max(0, end - max(first, len(raw))), BLOCK))
            if _fields(raw[first:end] + padding) == [
                (f"{key}.{name}", data) for name, data in sorted(known[key].items())
            ]:
                found.add(key)
    return found


def _fields(stretch: bytes) -> list[tuple[str, bytes]]:
    """Sorted members of a stretch, by Python's own reader."""
    try:
        with tarfile.open(fileobj=io.BytesIO(stretch + bytes(2 * BLOCK))) as tar:
            members = [(m.name, m, tar.extractfile(m)) for m in tar]
            if sum(BLOCK + -(-m.size // BLOCK) * BLOCK for _, m, _ in members) != len(stretch):
                return []
            return sorted((name, file.read() if file else b"") for name, _, file in members)
    except tarfile.TarError:
        return []


def _lengths(folder: Path) -> list[int]:
    return [p.stat().st_size for p in sorted(folder.glob("*.idx"))]


# --- damages: (tars, random) -> None


def _flip(path: Path, places: list[int], random_: random.Random, most: int = 3) -> None:
    raw = bytearray(path.read_bytes())
    for place in random_.sample(places, min(len(places), random_.randint(1, most))):
        raw[place] ^= 1 << random_.randrange(8)
    path.write_bytes(raw)


def _members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as file:
        return file.getmembers()


def _cut(tars: list[Path], random_: random.Random) -> None:
    tar = random_.choice(tars)
    tar.write_bytes(tar.read_bytes()[: random_.randrange(tar.stat().st_size)])


def _header(tars: list[Path], random_: random.Random) -> None:
    tar = random_.choice(tars)
    member = random_.choice(_members(tar))
    _flip(tar, list(range(member.offset, member.offset + BLOCK)), random_)


def _payload(field: str) -> Callable[[list[Path], random.Random], None]:
    def damage(tars: list[Path], random_: random.Random) -> None:
        tar = random_.choice(tars)
        member = random_.choice([m for m in _members(tar) if m.name.endswith(field)])
        _flip(tar, list(range(member.offset_data, member.offset_data + member.size)), random_)

    return damage


def _rewrite(
    change: Callable[[list[tuple[str, bytes]], random.Random], None],
) -> Callable[..., None]:
    """Change the list of members; the index stays as it was."""

    def damage(tars: list[Path], random_: random.Random) -> None:
        path = random_.choice(tars)
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        change(members, random_)
        path.write_bytes(tar_of(members) + bytes(2 * BLOCK))

    return damage


def _duplicate(members: list[tuple[str, bytes]], random_: random.Random) -> None:
    members.insert(random_.randrange(len(members)), random_.choice(members))


def _drop(members: list[tuple[str, bytes]], random_: random.Random) -> None:
    del members[random_.randrange(len(members))]


def _reorder(members: list[tuple[str, bytes]], random_: random.Random) -> None:
    a, b = random_.sample(range(len(members)), 2)
    members[a], members[b] = members[b], members[a]


def _exchange(members: list[tuple[str, bytes]], random_: random.Random) -> None:
    """The bytes of two members of the same name and length change places."""
    a = random_.randrange(len(members))
    field = members[a][0].partition(".")[2]
    fits = [
        i
        for i, (name, data) in enumerate(members)
        if name.partition(".")[2] == field and len(data) == len(members[a][1]) and i != a
    ]
    b = random_.choice(fits or [a])
    (name_a, data_a), (name_b, data_b) = members[a], members[b]
    members[a], members[b] = (name_a, data_b), (name_b, data_a)


def _copy_sample(tars: list[Path], random_: random.Random) -> None:
    """A sample over another one whose stretch is as long."""
    source, target = random_.choice(tars), random_.choice(tars)
    n, places = random_.randrange(EACH), offsets(source)
    block = source.read_bytes()[places[n] : places[n + 1]]
    there = offsets(target)
    fits = [m for m in range(EACH) if there[m + 1] - there[m] == len(block)]
    if fits:
        raw, first = bytearray(target.read_bytes()), there[random_.choice(fits)]
        raw[first : first + len(block)] = block
        target.write_bytes(raw)


def _swap(*suffixes: str) -> Callable[[list[Path], random.Random], None]:
    def damage(tars: list[Path], random_: random.Random) -> None:
        pair = random_.sample(tars, 2)
        for suffix in suffixes:
            a, b = (tar.with_suffix(suffix) for tar in pair)
            raw = a.read_bytes()
            a.write_bytes(b.read_bytes())
            b.write_bytes(raw)

    return damage


def _offset_flip(tars: list[Path], random_: random.Random) -> None:
    path = random_.choice(tars).with_suffix(".tar.idx")
    _flip(path, list(range(path.stat().st_size)), random_)


def _offset_list(tars: list[Path], random_: random.Random) -> None:
    """Entries too few, too many, repeated or in another order."""
    tar = random_.choice(tars)
    places, n = offsets(tar), random_.randrange(EACH)
    write_offsets(
        tar,
        random_.choice(
            [
                places[:n],
                places + [places[-1]] * (n + 1),
                places[:n] + places[n : n + 1] + places[n:-1],
                places[:n] + places[n:][::-1],
            ]
        ),
    )


def _database(tars: list[Path], random_: random.Random) -> None:
    """Cut, pages of zeros, or one byte in fifty flipped."""
    path = tars[0].parent / ".nv-meta" / "index.sqlite"
    raw = bytearray(path.read_bytes())
    kind = random_.randrange(3)
    if kind == 0:
        raw = raw[: random_.randrange(len(raw))]
    elif kind == 1:
        first = random_.randrange(len(raw) // 4096) * 4096
        raw[first : first + 4096] = bytes(4096)
    else:
        for place in random_.sample(range(len(raw)), len(raw) // 50):
            raw[place] ^= 1 << random_.randrange(8)
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[list[Path], random.Random], None]] = {
    "shard cut short": _cut,
    "bits flipped in a tar header": _header,
    "bits flipped in a media member": _payload("mp4"),
    "bits flipped in a json member": _payload("json"),
    "a member written twice": _rewrite(_duplicate),
    "a member left out": _rewrite(_drop),
    "two members in each other's place": _rewrite(_reorder),
    "bytes of two members exchanged": _rewrite(_exchange),
    "a sample copied over another": _copy_sample,
    "two shards exchanged": _swap(".tar"),
    "two shards exchanged with their .tar.idx": _swap(".tar", ".tar.idx"),
    "two .tar.idx exchanged": _swap(".tar.idx"),
    "bits flipped in a .tar.idx": _offset_flip,
    "entries of a .tar.idx missing, added or in disorder": _offset_list,
    "index.sqlite cut, zeroed or flipped": _database,
}
