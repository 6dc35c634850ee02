"""Media and a manifest to shards: WebDataset tars with Energon's index.

    python -m data_tools.make_shards MANIFEST_OR_FOLDER... OUT [--reencode short_side=128,gop=20]

A manifest whose rows name a `split` fills OUT/<split>; without splits the shards lie in OUT itself.
The tars and manifest.json are byte-identical whatever the number of workers. Rows whose media is
bad are left out and listed with the reason in quarantine.jsonl.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.manifest import Row, find_manifests, read_rows
from data_tools.shard_rows import Made, Options, prepare
from data_tools.shard_writer import QUARANTINE, ShardWriter, build_index, install
from data_tools.transcode import Encoding
from mmssl.data.folders import MANIFEST
from mmssl.data.remote import META_FOLDER
from mmssl.types import UserError


@dataclass(frozen=True)
class Report:
    """What was written to one folder."""

    folder: Path
    shards: int
    samples: int
    quarantined: int
    unchanged: bool


def make_shards(
    inputs: str | Path | Sequence[str | Path], out: str | Path, **options: Any
) -> list[Report]:
    """Make shards of one or several manifests; see the module's text.

    Args:
        inputs: manifests, folders that hold some or media, or addresses; see `data_tools.manifest`.
        out: folder to write; an existing part is left alone if it is identical, else refused.
        options: fields of `Options`.

    Returns:
        One report per folder of shards.

    Raises:
        UserError: a manifest is wrong, a part exists and differs, or no row was usable.
    """
    chosen = Options(**options)
    check_options(chosen)
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    parts = _parts([m for p in paths for m in find_manifests(p)])
    targets = {split: Path(out) / split if split else Path(out) for split in parts}
    for target in targets.values():
        _check_target(target, chosen.overwrite)
    return [_make_part(split, rows, targets[split], chosen) for split, rows in parts.items()]


def check_options(options: Options) -> None:
    """Refuse sizes nobody can mean.

    Raises:
        UserError: names the option.
    """
    if options.shard_samples < 1:
        raise UserError(f"--shard-samples {options.shard_samples}: must be 1 or more")
    if not options.shard_mb > 0:
        raise UserError(f"--shard-mb {options.shard_mb:g}: must be above 0")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one worker is needed")


def _parts(manifests: Sequence[Path | str]) -> dict[str, list[Row]]:
    """Rows by split; a split comes from one manifest, whose row numbers then are unique in it."""
    parts: dict[str, list[Row]] = {}
    origin: dict[str, Path | str] = {}
    for path in manifests:
        for row in read_rows(path):
            if origin.setdefault(row.split, path) != path:
                raise UserError(
                    f"{path} and {origin[row.split]} both fill the split {row.split!r}; put their "
                    "rows into one manifest, or make two shard folders and blend them in "
                    "`data.train`"
                )
            parts.setdefault(row.split, []).append(row)
    if "" in parts and len(parts) > 1:
        raise UserError(f"{origin['']}: some rows have a `split` and others not; give all rows one")
    return parts


def _check_target(target: Path, overwrite: bool) -> None:
    """Files that are not ours are never replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is no folder; choose another output")
    ours = re.compile(r"[a-z0-9_]+-\d{6}\.tar(\.idx)?")
    known = {META_FOLDER, MANIFEST, QUARANTINE}
    foreign = [
        p.name for p in target.iterdir() if p.name not in known and not ours.fullmatch(p.name)
    ]
    if foreign and (overwrite or not (target / MANIFEST).exists()):
        raise UserError(
            f"{target}: holds files that are no shards ({', '.join(sorted(foreign)[:3])}); choose "
            "an empty folder"
        )


def _make_part(split: str, rows: Sequence[Row], target: Path, options: Options) -> Report:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = ShardWriter(partial, split or "shard", options)
        bar = tqdm(_made(rows, options), total=len(rows), desc=split, unit="clip", disable=None)
        for made in bar:
            writer.add(made)
        writer.close()
        if not writer.shards:
            first = writer.quarantine[0]
            raise UserError(
                f"{rows[0].where}: none of the {len(rows)} rows is usable; the first: "
                f"{first['message']}"
            )
        build_index(partial, [s["name"] for s in writer.shards], options.workers)
        unchanged = install(partial, target, options.overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Report(target, len(writer.shards), writer.total, len(writer.quarantine), unchanged)


# --- one row


def _made(rows: Sequence[Row], options: Options) -> Iterator[Made]:
    """Rows in their order, prepared in this process or in several."""
    if options.workers == 1 or len(rows) < 2:
        for row in rows:
            yield prepare(row, options)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Row, Future[Made]]] = deque()
    rest = iter(rows)
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        try:
            for row in rest:
                waiting.append((row, pool.submit(prepare, row, options)))
                if len(waiting) >= 8 * options.workers:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            names = ", ".join(str(row.media) for row, _ in list(waiting)[: 8 * options.workers])
            raise UserError(
                "a worker died, probably in a decoder or for lack of memory, on one of: "
                f"{names}; find the file with --workers 1 and remove its row"
            ) from error


# --- command line


def _print(reports: Iterable[Report]) -> None:
    for report in reports:
        note = ", unchanged" if report.unchanged else ""
        print(f"{report.folder}: {report.samples} samples in {report.shards} shards{note}")
        if report.quarantined:
            print(f"  {report.quarantined} rows left out, see {report.folder / QUARANTINE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.make_shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", nargs="+", metavar="MANIFEST_OR_FOLDER")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard-samples", type=int, default=Options.shard_samples)
    parser.add_argument("--shard-mb", type=float, default=Options.shard_mb)
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--reencode", default=None, metavar="short_side=128,gop=20,fps=10")
    parser.add_argument("--no-verify", action="store_true", help="skip the trial decoding")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that differ")
    args = parser.parse_args(argv)
    try:
        reports = make_shards(
            args.inputs,
            args.out,
            shard_samples=args.shard_samples,
            shard_mb=args.shard_mb,
            workers=args.workers,
            reencode=None if args.reencode is None else Encoding.parse(args.reencode),
            verify=not args.no_verify,
            overwrite=args.overwrite,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
