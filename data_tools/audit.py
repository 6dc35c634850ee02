"""Audits a corpus before it is trained on: what is in it, what is damaged, still, silent or double.

    python -m data_tools.audit SHARDS_OR_MANIFEST_OR_FOLDER --out FOLDER [--clips N] [--workers N]

OUT/audit.html shows it, OUT/audit.json holds the numbers, OUT/clips.jsonl every clip with its
measurements and flags. OUT/quarantine-audit.jsonl lists the keys of clips whose flag is in --drop:
copied into the folder of a run, training leaves them out, if `data.max_bad_share` is above their
share. Of a manifest or folder of media, those rows and the damaged ones are also left out of
OUT/kept.jsonl, a manifest for make_shards. Clips that --clips did not draw stay in it.

Measurements go to OUT/measured.jsonl as they are made. A run that was killed goes on there, and one
with more clips adds to them; a file that changed under the same name is not measured again.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from data_tools import audit_page
from data_tools.audit_clip import measure
from data_tools.audit_source import Rows, Source, open_source
from data_tools.audit_summary import FLAGS, Collected, Duplicates, find_duplicates, flags_of
from data_tools.kept_rows import write_drops, write_manifest
from mmssl.data.integrity import DamagedSampleError, canonical
from mmssl.data.isolate import DecodeChild
from mmssl.files import whole_file
from mmssl.types import UserError

MEASURED, VERSION = "measured.jsonl", "mmssl-audit-1"
DROPPED = ("silent", "still", "black", "duplicate")
SECONDS, MEGABYTES = 300.0, 4000  # for one clip
_CHUNK = 8  # clips that a worker measures before it tells
_LISTED = 1000  # groups of duplicates in audit.json
_CODES = ("audio_code", "video_code")

Clip = dict[str, Any]


def audit(
    data: str, out: str | Path, clips: int = 0, workers: int = 1, drop: Sequence[str] = DROPPED
) -> dict[str, Any]:
    """Measure what is missing and write all files; see the module's text.

    Args:
        data: shards, a manifest or a folder of media.
        out: folder.
        clips: so many, drawn at random; 0 for all.
        workers: processes.
        drop: flags of `FLAGS`; their clips are listed as to be dropped.

    Returns:
        The content of audit.json.

    Raises:
        UserError: no such data, an unknown flag, or a folder with the audit of other data.
    """
    for flag in drop:
        if flag not in FLAGS:
            raise UserError(f"--drop: no flag {flag!r}; known: {', '.join(FLAGS)}")
    out = Path(out)
    source = open_source(data)
    chosen = _chosen(len(source), clips)
    log = MeasuredLog(out / MEASURED, source)
    missing = [n for n in chosen if n not in log.places]
    with tqdm(total=len(chosen), initial=len(chosen) - len(missing), unit="clip") as bar:
        for found in _measured(data, source, missing, workers):
            log.add(found)
            bar.update(len(found))
    wanted = set(chosen)
    return _report(source, log, [n for n in sorted(log.places) if n in wanted], out, drop)


def _chosen(count: int, clips: int) -> list[int]:
    """All, or a random part to which a larger one only adds."""
    order = list(range(count))
    if clips <= 0 or clips >= count:
        return order
    random.Random(0).shuffle(order)
    return sorted(order[:clips])


# ---------------------------------------------------------------- measuring


class MeasuredLog:
    """The append-only file of measurements: a line that says of what, then one for each clip."""

    def __init__(self, path: Path, source: Source) -> None:
        """Read what is there; from a line that a kill cut off or that is damaged it is cut away.

        Raises:
            UserError: it belongs to other data.
        """
        self.path = path
        self.places: dict[int, int] = {}
        head = canonical({"format": VERSION, "data": source.name, "digest": source.digest})
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0)
            first = file.readline()
            if first.endswith(b"\n") and _field(first, "digest") != source.digest:
                raise UserError(
                    f"{path}: measurements of other data, or of another state of {source.name}; "
                    "choose another --out or remove the file"
                )
            whole = len(first) if first.endswith(b"\n") else 0
            for line in file if whole else ():
                number = _field(line, "number") if line.endswith(b"\n") else None
                if number is None:
                    break
                self.places[number] = whole
                whole += len(line)
            file.truncate(whole)
            if not whole:
                file.write(head + b"\n")

    def add(self, clips: Sequence[Clip]) -> None:
        """Append clips."""
        with self.path.open("ab") as file:
            for clip in clips:
                self.places[clip["number"]] = file.tell()
                file.write(json.dumps(clip, separators=(",", ":")).encode() + b"\n")

    def read(self, numbers: Sequence[int]) -> Iterator[Clip]:
        """Clips by their numbers."""
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self.places[number])
                yield json.loads(file.readline())


def _field(line: bytes, name: str) -> Any:
    """A value of a line of the log, None where it is damaged."""
    try:
        return json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        return None


def _measured(
    data: str, source: Source, numbers: Sequence[int], workers: int
) -> Iterator[list[Clip]]:
    """Measurements in pieces, as they come."""
    chunks = (numbers[k : k + _CHUNK] for k in range(0, len(numbers), _CHUNK))
    if workers == 1 or len(numbers) <= _CHUNK:
        child = guarded(measure)
        try:
            yield from ([_clip(source, child, n) for n in chunk] for chunk in chunks)
        finally:
            child.close()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (data,)) as pool:
        waiting: deque[Future[list[Clip]]] = deque()
        try:
            for chunk in islice(chunks, 4 * workers):
                waiting.append(pool.submit(_work, chunk))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_work, chunk) for chunk in islice(chunks, 1))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, probably for lack of memory; the same command goes on, with "
                "fewer --workers if need be"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[Source, Callable[..., Any]]


def _begin(data: str) -> None:
    global _worker
    _worker = open_source(data), guarded(measure)


def _work(numbers: Sequence[int]) -> list[Clip]:
    return [_clip(*_worker, n) for n in numbers]


def guarded(work: Callable[..., Any]) -> Any:
    """`work` in a decoding child: a file that hangs or kills the decoder costs one clip."""
    return DecodeChild(cast("Any", work), SECONDS, MEGABYTES)


def _clip(source: Source, child: Callable[..., Any], number: int) -> Clip:
    """The line of a clip; what is wrong with one is `reason` and `message`."""
    clip: Clip = {"number": number, "where": source.where(number)}
    try:
        item = source.item(number)
        clip |= {
            "key": item.key,
            "part": item.part,
            "source": item.source,
            "captions": list(item.captions),
            "language": item.language,
            "licence": item.licence,
            "bytes": sum(map(len, item.fields.values())),
        }
        found = child(item.sample()) if item.fields else {"has": []}
    except DamagedSampleError as error:
        return clip | {"reason": error.reason, "message": str(error)}
    has = sorted({*found["has"], *(["text"] if item.captions else [])})
    return clip | found | {"has": has}


# ---------------------------------------------------------------- reporting


def _report(
    source: Source, log: MeasuredLog, numbers: Sequence[int], out: Path, drop: Sequence[str]
) -> dict[str, Any]:
    twins = find_duplicates(log.read(numbers))
    collected, first = Collected(), twins.first
    flags: dict[int, list[str]] = {}
    extremes = Extremes()
    with whole_file(out / "clips.jsonl") as partial, partial.open("wb") as file:
        for clip in log.read(numbers):
            number = clip["number"]
            found = flags_of(clip) + (["duplicate"] if number in first else [])
            if found:
                flags[number] = found
            collected.add(clip, found)
            extremes.add(clip)
            shown = {k: v for k, v in clip.items() if k not in _CODES} | {"flags": found}
            if number in first:
                shown["duplicate_of"] = first[number]
            file.write(json.dumps(shown).encode() + b"\n")
    tree = {
        "format": VERSION,
        "data": source.name,
        "digest": source.digest,
        "of": len(source),
        **collected.summary(),
        "duplicates": _listed(twins),
    }
    tree["dropped"] = {"flags": list(drop), "n": _write_choice(source, log, flags, drop, out)}
    with whole_file(out / "audit.json") as partial:
        text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        partial.write_bytes(text.encode(errors="backslashreplace"))
    sheets = audit_page.Sheets(source, log.read, numbers, flags, twins, extremes, guarded)
    audit_page.write(tree, sheets, out / "audit.html")
    return tree


def _listed(twins: Duplicates) -> dict[str, Any]:
    """How many groups and copies there are, and the first of them."""
    return {
        kind: {
            "groups": len(found),
            "copies": sum(len(group) - 1 for group in found),
            "numbers": found[:_LISTED],
        }
        for kind, found in vars(twins).items()
    }


def _write_choice(
    source: Source,
    log: MeasuredLog,
    flags: Mapping[int, Sequence[str]],
    drop: Sequence[str],
    out: Path,
) -> int:
    """The list of what is to be dropped, and the manifest of the rest; returns how many."""
    why = {n: [f for f in found if f in drop] for n, found in flags.items()}
    chosen = [n for n, found in why.items() if found]
    drops = (
        (clip["key"], why[clip["number"]][0], f"audit: {', '.join(why[clip['number']])}")
        for clip in log.read(chosen)
        if "key" in clip
    )
    write_drops(drops, out / "quarantine-audit.jsonl")
    if isinstance(source, Rows):
        gone = {*chosen, *(n for n, found in flags.items() if "damaged" in found)}
        kept = (row for n, row in enumerate(source.rows) if n not in gone)
        write_manifest(kept, out / "kept.jsonl")
    return len(chosen)


class Extremes:
    """The numbers of the quietest and the loudest clips."""

    def __init__(self, count: int = 6) -> None:
        self._count = count
        self._heaps: dict[str, list[tuple[float, int]]] = {"quiet": [], "loud": []}

    def add(self, clip: Clip) -> None:
        """Take in a clip."""
        value = clip.get("loudness_lufs")
        if value is None:
            return
        for name, sign in (("quiet", -1), ("loud", 1)):
            heap = self._heaps[name]
            heapq.heappush(heap, (sign * value, clip["number"]))
            if len(heap) > self._count:
                heapq.heappop(heap)

    def numbers(self, name: str) -> list[int]:
        """`quiet` or `loud`, the most extreme first."""
        return [n for _, n in sorted(self._heaps[name], reverse=True)]


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.audit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", metavar="SHARDS_OR_MANIFEST_OR_FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--clips", type=int, default=0, metavar="N", help="drawn; 0 for all")
    workers = max(1, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes")
    known = f"of {', '.join(FLAGS)}; without it {', '.join(DROPPED)}"
    parser.add_argument("--drop", default=",".join(DROPPED), metavar="FLAG,...", help=known)
    args = parser.parse_args(argv)
    try:
        flags = [flag for flag in args.drop.split(",") if flag]
        tree = audit(args.data, args.out, args.clips, max(1, args.workers), flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flagged = ", ".join(f"{name} {n}" for name, n in tree["flags"].items())
    print(f"{args.data}: {tree['clips']} of {tree['of']} clips; {flagged}")
    print(f"{tree['dropped']['n']} to drop; see {args.out / 'audit.html'}")
    if tree["clips"] < tree["of"]:
        print(f"{tree['of'] - tree['clips']} clips were not measured; none of them is left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
