"""Frame labels for shards: features, a clustering, and a side-car of ids for `data.frame_labels`.

    python -m data_tools.label_shards SHARDS OUT.safetensors --features mfcc --clusters 100
    python -m data_tools.label_shards SHARDS OUT.safetensors --features RUN --layer 6 --clusters 500
    python -m data_tools.label_shards SHARDS OUT.safetensors --features RUN --codes 13500
    python -m data_tools.label_shards VAL OUT2.safetensors --kmeans OUT.kmeans-100.safetensors

The first passes fit k-means on a share of the samples, the last one labels all of them; no pass
keeps more than `--points` of the features, and no more than one fits where that holds all of them.
`--clusters 100,500` makes an ensemble of two codebooks, fitted in the same passes.
`--codes N` clusters nothing: the labels are the N most frequent tuples of entries that the
quantiser of a run (vq-wav2vec) chooses, and one class for all others. The clustering, or the table
of tuples, is kept beside OUT: it labels other folders with the same classes, and labelling that was
broken off goes on from it. The same shards and options give the same bytes whatever the number of
workers.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from data_tools.label_codes import CodeBook, observe
from data_tools.label_features import Floats, FrameSource, frame_source
from mmssl.data.folders import read_manifest
from mmssl.data.labels import check
from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import LabelInfo, SideCar, shards_digest, writing
from mmssl.rng import numpy_generator
from mmssl.specs import LabellingSpec
from mmssl.targets.clusters import Clusters, fit_together
from mmssl.types import UserError

DEFAULTS = LabellingSpec()


@dataclass(frozen=True)
class Labelled:
    """A written side-car; unread: samples that could not be read."""

    path: Path
    samples: int
    unread: int
    labels: int
    kmeans: tuple[Path, ...]
    codebooks: tuple[Clusters | CodeBook, ...]
    warnings: tuple[str, ...]


class Frames(NamedTuple):
    """Features of one sample, (T, D), and its length."""

    key: str
    features_TD: Floats
    seconds: float


# ---------------------------------------------------------------- the passes


def label_shards(shards: str | Path, out: str | Path, options: LabellingSpec) -> Labelled:
    """Fit, unless clusterings are given, and label every sample of a folder.

    Args:
        shards: a folder made by make_shards, or its address.
        out: the side-car to write; clusterings that are fitted go beside it.
        options: what to do.

    Raises:
        UserError: no such shards or run, features that cannot be clustered, or a
            clustering of other features.
    """
    out = Path(out)
    total = sum(shard.samples for shard in read_manifest(shards))
    source = frame_source(options.features, options.tower, options.layer, options.codes > 0)
    files, sizes = options.kmeans, (options.codes,) if options.codes else options.clusters
    if not files:
        files = tuple(_book_file(out, k, options) for k in sizes)
        rows = _share(total, options)
        fitted = _fit(shards, source, rows, sizes, options)
        for file, codebook in zip(files, fitted, strict=True):
            codebook.save(file)
    codebooks = tuple(_fitting(file, source, options) for file in files)
    info = LabelInfo(
        source=source.source,
        classes=tuple(c.count for c in codebooks),
        shards=shards_digest(shards),
        codebooks=tuple(c.digest for c in codebooks),
    )
    with writing(out, info) as writer:
        for key, features_TD, seconds in _read(
            shards, source, range(total), options.workers, "label"
        ):
            ids = [codebook.assign(features_TD) for codebook in codebooks]
            writer.add(key, np.stack(ids, axis=1), seconds)
    warnings = tuple(check(SideCar(out), info.rate_hz, total))
    unread = total - len(writer)
    return Labelled(out, len(writer), unread, writer.labels, files, codebooks, warnings)


def _book_file(out: Path, size: int, options: LabellingSpec) -> Path:
    kind = "codes" if options.codes else "kmeans"
    return out.with_name(f"{out.stem}.{kind}-{size}.safetensors")


def _share(total: int, options: LabellingSpec) -> list[int]:
    """Numbers of the samples that are fitted to."""
    count = math.ceil(options.fit_share * total)
    rng = numpy_generator(options.seed, "fit share")
    return sorted(int(i) for i in rng.choice(total, count, replace=False))


def _fit(
    shards: str | Path,
    source: FrameSource,
    rows: Sequence[int],
    sizes: Sequence[int],
    options: LabellingSpec,
) -> Sequence[Clusters | CodeBook]:
    if options.codes:
        read = _read(shards, source, rows, options.workers, "codes")
        return [observe((frames.features_TD for frames in read), options.codes, source.source)]
    counts, number = ", ".join(map(str, sizes)), 0

    def stream() -> Iterator[Floats]:
        nonlocal number
        name = f"k-means {counts}: " + (f"sweep {number}" if number else "sample")
        number += 1
        for frames in _read(shards, source, rows, options.workers, name):
            yield frames.features_TD

    return fit_together(
        stream,
        sizes,
        source.source,
        sweeps=options.sweeps,
        points=options.points,
        restarts=options.restarts,
        seed=options.seed,
    )


def _fitting(file: Path, source: FrameSource, options: LabellingSpec) -> Clusters | CodeBook:
    clusters = CodeBook.load(file) if options.codes else Clusters.load(file)
    if clusters.source != source.source:
        raise UserError(
            f"{file}: clusters of {clusters.source}, the features are {source.source}; use the "
            "features it was fitted to"
        )
    return clusters


def _read(
    shards: str | Path, source: FrameSource, rows: Sequence[int], workers: int, name: str
) -> Iterator[Frames]:
    """Features of the samples of these numbers, in order; none where a sample has no audio.

    Workers decode; features are computed here, clip by clip, so that their number and their
    neighbours change no digit.
    """
    batches = eval_batches(
        shards, source.data, {"x": source.view}, 1, None, workers=workers, rows=rows
    )
    for batch in tqdm(batches, total=len(rows), desc=name, unit="clip", disable=None):
        view = batch.views["x"]
        if view.dummy:
            yield Frames(batch.keys[0], np.empty((0, source.width), np.float32), 0.0)
            continue
        seconds = view.data.shape[1] / view.rate
        yield Frames(batch.keys[0], source.frames(view), seconds)


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.label_shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", default=DEFAULTS.features, metavar="mfcc|mfcc_cmvn|RUN")
    parser.add_argument("--layer", type=int, default=0, help="of a run; 0 = the output")
    parser.add_argument("--tower", default="", help="of a run with several audio towers")
    parser.add_argument("--clusters", type=_several(int), default=DEFAULTS.clusters)
    parser.add_argument("--codes", type=int, default=0, metavar="N", help="of a run's quantiser")
    parser.add_argument("--kmeans", type=_several(Path), default=(), metavar="FILE[,FILE]")
    parser.add_argument("--fit-share", type=float, default=DEFAULTS.fit_share)
    parser.add_argument("--sweeps", type=int, default=DEFAULTS.sweeps)
    parser.add_argument("--points", type=int, default=DEFAULTS.points, help="frames held in memory")
    parser.add_argument("--restarts", type=int, default=DEFAULTS.restarts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    return parser


def _options(args: dict[str, Any]) -> LabellingSpec:
    try:
        return LabellingSpec(**args)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} {first['input']}: {first['msg']}") from error


def _several(kind: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    def parse(text: str) -> tuple[object, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "comma-separated list"
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = vars(_parser().parse_args(argv))
    shards, out = args.pop("shards"), args.pop("out")
    try:
        made = label_shards(shards, out, _options(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made.path}: {made.labels} labels of {made.samples} samples")
    for file, codebook in zip(made.kmeans, made.codebooks, strict=True):
        print(f"  {file}: {codebook.describe()}")
    if made.unread:
        print(f"  {made.unread} samples could not be read; run python -m data_tools.check_shards")
    for warning in made.warnings:
        print(f"  warning: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
