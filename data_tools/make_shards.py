"""Media and a manifest to shards: WebDataset tars with Energon's index.

    python -m data_tools.make_shards MANIFEST_OR_FOLDER... OUT [--reencode short_side=128,gop=20]

A manifest whose rows name a `split` fills OUT/<split>; without splits the shards lie in OUT itself.
The tars and manifest.json are byte-identical whatever the number of workers or the engine. Rows
whose media is bad, or ends, stalls or fills the process that reads it, are left out and listed with
the reason in quarantine.jsonl. Rows are settled in order and for good: the same command after a
kill or a failure goes on with the next. Nothing stands under OUT before it is whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data_tools.engines import ENGINES
from data_tools.journal import JOURNAL, Part
from data_tools.manifest import Place, find_manifests, read_rows
from data_tools.shard_rows import Options
from data_tools.shard_writer import (
    BUILD,
    QUARANTINE,
    HopelessError,
    ShardWriter,
    build_index,
    finished,
    install,
)
from data_tools.transcode import Encoding
from mmssl.data.folders import MANIFEST
from mmssl.data.media import Limits
from mmssl.data.remote import META_FOLDER
from mmssl.types import UserError

T = TypeVar("T")

_LOG_S = 60.0  # between lines of progress in a log


@dataclass(frozen=True)
class Report:
    """What was written to one folder; worker_mb: most memory that a worker had."""

    folder: Path
    shards: int
    samples: int
    quarantined: int
    unchanged: bool
    worker_mb: int = 0


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
        UserError: a manifest is wrong, a part exists and differs, no or too few rows were usable,
            or an unfinished build is in the way.
    """
    chosen = Options(**options)
    check_options(chosen)
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    parts = _parts([m for p in paths for m in find_manifests(p)])
    home = Path(out).resolve()  # "." has no name, and what a link names may be on another disk
    targets = {split: home / split if split else home for split in parts}
    for target in targets.values():
        _check_target(target, chosen.overwrite)
    return [_make_part(part, targets[split], chosen) for split, part in parts.items()]


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
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"--max-bad-share {options.max_bad_share:g}: must be from 0 to 1")
    if not (options.row_seconds > 0 and options.row_mb > 0 and options.limits.max_seconds > 0):
        raise UserError("--row-seconds, --row-mb and --max-seconds must be above 0")


def _parts(manifests: Sequence[Place]) -> dict[str, Part]:
    """Rows by split; a split comes from one manifest, whose row numbers then are unique in it."""
    parts: dict[str, Part] = {}
    for path in manifests:
        for row in _shown(read_rows(path), "rows", None, 0):
            if row.split not in parts:
                parts[row.split] = Part(path, row)
            part = parts[row.split]
            if part.place != path:
                raise UserError(
                    f"{path} and {part.place} both fill the split {row.split!r}; put their "
                    "rows into one manifest, or make two shard folders and blend them in "
                    "`data.train`"
                )
            part.note(row)
    if "" in parts and len(parts) > 1:
        raise UserError(
            f"{parts[''].place}: some rows have a `split` and others not; give all rows one"
        )
    return parts


def _shown(work: Iterable[T], name: str, total: int | None, done: int) -> Iterator[T]:
    """Progress, rate and time left: at a terminal at once, in a log from a minute on."""
    log_s = 0 if sys.stderr.isatty() else _LOG_S
    yield from tqdm(
        work, name, total, unit=" clips", initial=done, delay=log_s, mininterval=log_s or 0.1
    )


def _check_target(target: Path, overwrite: bool) -> None:
    """Files that are not ours are never replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is no folder; choose another output")
    ours = re.compile(r"[a-z0-9_]+-\d{6}\.tar(\.idx)?")
    known = {META_FOLDER, MANIFEST, QUARANTINE, JOURNAL}
    foreign = [
        p.name for p in target.iterdir() if p.name not in known and not ours.fullmatch(p.name)
    ]
    if foreign and (overwrite or not (target / MANIFEST).exists()):
        raise UserError(
            f"{target}: holds files that are no shards ({', '.join(sorted(foreign)[:3])}); choose "
            "an empty folder"
        )


def _make_part(part: Part, target: Path, options: Options) -> Report:
    digest = part.digest(options)
    if not options.overwrite and finished(target, digest):
        tree = json.loads((target / MANIFEST).read_bytes())
        left_out = part.count - tree["samples"]
        return Report(target, len(tree["shards"]), tree["samples"], left_out, True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with closing(_writer(part, partial, options, digest)) as writer:
            _fill(writer, part, options)
            build_index(partial, [s["name"] for s in writer.shards], options.workers)
            (partial / BUILD).write_text(digest)
            unchanged = install(partial, target, options.overwrite)
    except HopelessError:
        shutil.rmtree(partial)
        raise
    except OSError as error:
        raise UserError(
            f"{partial}: {error.strerror or error}; mend that and rerun the command: it goes on"
        ) from error
    counts = len(writer.shards), writer.total, writer.bad
    return Report(target, *counts, unchanged, writer.worker_mb)


def _writer(part: Part, folder: Path, options: Options, digest: str) -> ShardWriter:
    return ShardWriter(folder, part.split or "shard", part.count, options, digest)


def _fill(writer: ShardWriter, part: Part, options: Options) -> None:
    """Prepare and write the rows that are missing."""
    made = ENGINES[options.engine](islice(part, writer.rows, None), options)
    for row in _shown(made, part.split, part.count, writer.rows):
        writer.add(row)
    writer.finish()
    if not writer.shards:
        raise HopelessError(
            f"{part.where}: none of the {part.count} rows is usable; the first: {writer.first_bad}"
        )


# --- command line


def _print(reports: Iterable[Report]) -> None:
    for report in reports:
        note = ", unchanged" if report.unchanged else ""
        if report.worker_mb:
            note += f"; workers took up to {report.worker_mb} MB"
        print(f"{report.folder}: {report.samples} samples in {report.shards} shards{note}")
        if report.quarantined:
            print(f"  {report.quarantined} rows left out, see {report.folder / QUARANTINE}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.make_shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("inputs", nargs="+", metavar="MANIFEST_OR_FOLDER")
    add("out", type=Path)
    add("--shard-samples", type=int, default=Options.shard_samples)
    add("--shard-mb", type=float, default=Options.shard_mb)
    add("--workers", type=int, default=max(1, os.cpu_count() or 1))
    add("--engine", choices=tuple(ENGINES), default=Options.engine)
    add("--reencode", metavar="short_side=128,gop=20,fps=10,audio=flac")
    add("--no-verify", dest="verify", action="store_false", help="skip the trial decoding")
    add("--max-seconds", type=float, default=Limits().max_seconds, help="length of a media file")
    add("--max-bad-share", type=float, default=Options.max_bad_share, help="of 1000 rows")
    add("--row-seconds", type=float, default=Options.row_seconds, help="time limit of a row")
    add("--row-mb", type=int, default=Options.row_mb, help="memory limit of a row")
    add("--overwrite", action="store_true", help="make all anew and replace shards that differ")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(_parser().parse_args(argv))
    try:
        inputs, out, seconds = (args.pop(name) for name in ("inputs", "out", "max_seconds"))
        if args["reencode"] is not None:
            args["reencode"] = Encoding.parse(args["reencode"])
        reports = make_shards(inputs, out, limits=Limits(max_seconds=seconds), **args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    _print(reports)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else workers of the index stay
    sys.exit(main())
