"""Keeps the clips whose sound and picture belong together.

    mmssl embed DATA model=RUN out=VECTORS
    python -m data_tools.curate VECTORS --out FOLDER --keep 0.5 --by mi [--clusters 100,200]
    python -m data_tools.curate VECTORS --out FOLDER --keep 50000 --by similarity [--space NAME]

`mi` chooses the subset whose audio and video clusters share the most information (ACAV100M, see
`mutual`); the encoders may know nothing of each other: --video-vectors names the folder of the
other one. `similarity` keeps the highest cosines of sound and picture in a space of both.

OUT/scores.jsonl has every clip with its score (`mi`: pointwise mutual information in the whole
corpus, nats) and whether it is kept; OUT/kept.jsonl is a manifest for make_shards with the score in
`meta`. It needs the folder of media that was embedded, or --manifest, whose rows are found by their
media, or by their sample key where shards were embedded. Clips without sound or picture are left
out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools import mutual
from data_tools.audit_source import Rows
from data_tools.kept_rows import write_manifest
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.sidecars import Source
from mmssl.files import whole_file
from mmssl.index.vectors import parquet, read_facts
from mmssl.targets.clusters import fit
from mmssl.types import UserError

Floats = NDArray[np.float32]
_ROWS = 4096


@dataclass(frozen=True)
class Vectors:
    """One space and modality of a folder that `mmssl embed` wrote, file by file.

    model: its hash. folder: the corpus that was embedded.
    """

    path: Path
    space: str
    modality: str
    model: str
    folder: str

    def blocks(self) -> Iterator[tuple[list[str], Floats]]:
        """Keys and their mean unit vectors, in the order of the files."""
        wanted = [("space", "=", self.space), ("modality", "=", self.modality)]
        for file in sorted(self.path.glob("*.parquet")):
            table = parquet().read_table(file, columns=["key", "vector"], filters=wanted)
            keys = table.column("key").to_pylist()
            if not keys:
                continue
            x_ND = np.stack(table.column("vector").to_numpy()).astype(np.float32)
            firsts = [next(rows) for _, rows in groupby(range(len(keys)), keys.__getitem__)]
            yield [keys[i] for i in firsts], _unit(np.add.reduceat(_unit(x_ND), firsts))


def _unit(x_ND: Floats) -> Floats:
    return np.asarray(x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12))


def open_vectors(path: Path, modality: str, space: str = "") -> Vectors:
    """The vectors of a modality.

    Raises:
        UserError: no such vectors, of several models or corpora, or several spaces and none named.
    """
    facts = read_facts(path) if path.is_dir() else {}
    if not facts:
        raise UserError(f"{path}: no vectors; make some with mmssl embed DATA model=RUN out={path}")
    models = {(f.model, f.folder) for f in facts.values()}
    if len(models) > 1:
        raise UserError(f"{path}: vectors of several corpora; name a folder with those of one")
    known: set[str] = set()
    for file in facts:
        table = parquet().read_table(file, columns=["space"], filters=[("modality", "=", modality)])
        known.update(table.column("space").unique().to_pylist())
    if not known or (space and space not in known):
        raise UserError(
            f"{path}: no {modality} vectors{f' in the space {space!r}' if space else ''}; it has "
            f"{', '.join(sorted(known)) or 'none of that modality'}"
        )
    if not space and len(known) > 1:
        raise UserError(f"{path}: {modality} is in {', '.join(sorted(known))}; choose by --space")
    return Vectors(path, space or known.pop(), modality, *models.pop())


# ---------------------------------------------------------------- scores


def similarity(audio: Vectors, video: Vectors) -> tuple[list[str], NDArray[np.float64]]:
    """Clips that have both, and the cosine of their sound and picture.

    Raises:
        UserError: the vectors are of different models or spaces.
    """
    if (audio.model, audio.space) != (video.model, video.space):
        raise UserError(
            f"similarity: sound is in the space {audio.space!r}, pictures in {video.space!r}, or "
            "of another model; cosines need one space of both, --by mi does not"
        )
    seen = {key: x_D for keys, x_ND in video.blocks() for key, x_D in zip(keys, x_ND, strict=True)}
    keys, cosines = [], []
    for block, x_ND in audio.blocks():
        for key, x_D in zip(block, x_ND, strict=True):
            if key in seen:
                keys.append(key)
                cosines.append(float(x_D @ seen[key]))
    return keys, np.array(cosines)


def assigned(vectors: Vectors, clusters: int, seed: int) -> dict[str, int]:
    """Cluster of each clip; memory is that of the ids and of a sample of the vectors.

    Raises:
        UserError: see `clusters.fit_together`.
    """
    source = Source(f"{vectors.model}/{vectors.space}/{vectors.modality}", 1.0, 0.0)
    book = fit(lambda: (x_ND for _, x_ND in vectors.blocks()), clusters, source, seed=seed)
    return {
        key: int(k)
        for keys, x_ND in vectors.blocks()
        for key, k in zip(keys, book.assign(x_ND), strict=True)
    }


def assignments(
    audio: Vectors, video: Vectors, clusters: Sequence[int], seed: int
) -> tuple[list[str], mutual.Ints]:
    """Clips that have both, and (2, P, N) ids for all pairs of an audio and a video clustering."""
    books = [[assigned(v, k, seed) for k in clusters] for v in (audio, video)]
    keys = [key for key in books[0][0] if key in books[1][0]]
    heard, seen = (np.array([[book[key] for key in keys] for book in kind]) for kind in books)
    pairs = [(a, v) for a in heard for v in seen]
    return keys, np.array(pairs, np.int64).transpose(1, 0, 2)


# ---------------------------------------------------------------- choice


@dataclass(frozen=True)
class Choice:
    """Clips with their scores, and the chosen ones' numbers."""

    keys: list[str]
    scores_N: NDArray[np.float64]
    kept: NDArray[np.int64]


def choose(
    audio: Vectors, video: Vectors, by: str, keep: float, clusters: Sequence[int], seed: int = 0
) -> Choice:
    """The best clips.

    Args:
        audio: vectors of the sound.
        video: of the pictures.
        by: `mi` or `similarity`.
        keep: a number of clips, or below 1 a share of them.
        clusters: sizes of the clusterings of each modality.
        seed: of clusterings and batches.

    Raises:
        UserError: no clip has both, or see `similarity` and `assigned`.
    """
    if by == "mi":
        keys, ids_2PN = assignments(audio, video, clusters, seed)
        scores_N = mutual.pointwise(ids_2PN) if keys else np.zeros(0)
    else:
        keys, scores_N = similarity(audio, video)
    if not keys:
        raise UserError(f"{audio.path}, {video.path}: no clip has vectors of sound and of picture")
    size = min(len(keys), max(1, round(keep * len(keys) if keep < 1 else keep)))
    if by == "mi":
        kept = mutual.select(ids_2PN, size, seed)
    else:
        kept = np.sort(np.argsort(-scores_N, kind="stable")[:size])
    return Choice(keys, scores_N, kept)


def write(choice: Choice, by: str, folder: str, manifest: Path | None, out: Path) -> int:
    """Write scores.jsonl and, where there are rows, kept.jsonl; returns the rows in that.

    Raises:
        UserError: no row of the manifest is one of the clips.
    """
    kept = set(choice.kept.tolist())
    with whole_file(out / "scores.jsonl") as partial, partial.open("w") as file:
        for number, (key, score) in enumerate(zip(choice.keys, choice.scores_N, strict=True)):
            file.write(json.dumps({"key": key, by: float(score), "kept": number in kept}) + "\n")
    is_media = Path(folder).is_dir() and not any(Path(folder).glob("**/manifest.json"))
    if manifest is None and not is_media:
        (out / "kept.jsonl").unlink(missing_ok=True)  # of an earlier choice
        return 0
    rows = Rows(str(manifest or folder))
    places = {choice.keys[n]: float(choice.scores_N[n]) for n in kept}
    found = dict(_matches(rows, Path(folder), places, is_media))
    if not found:
        raise UserError(f"{rows.name}: none of its rows is a clip that was kept of {folder}")
    chosen = [rows.rows[n] for n in found]
    return write_manifest(chosen, out / "kept.jsonl", [{by: score} for score in found.values()])


def _matches(
    rows: Rows, folder: Path, scores: Mapping[str, float], is_media: bool
) -> Iterator[tuple[int, float]]:
    """Numbers of the rows that are kept, and their scores."""
    for number, row in enumerate(rows.rows):
        key = ""
        if is_media and isinstance(row.media, Path):
            path = row.media.resolve()
            key = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""
        elif not is_media:
            try:
                key = rows.item(number).key
            except DamagedSampleError:  # make_shards left it out, too
                continue
        if key in scores:
            yield number, scores[key]


def curate(options: argparse.Namespace) -> dict[str, Any]:
    """Choose and write; returns what is to be told."""
    if not 0 < options.keep < math.inf:
        raise UserError(f"--keep {options.keep:g}: a share below 1, or a number of clips")
    audio = open_vectors(options.vectors, "audio", options.space)
    video = open_vectors(options.video_vectors or options.vectors, "video", options.space)
    choice = choose(audio, video, options.by, options.keep, options.clusters, options.seed)
    rows = write(choice, options.by, audio.folder, options.manifest, options.out)
    return {"clips": len(choice.keys), "kept": len(choice.kept), "rows": rows}


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.curate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("vectors", type=Path, metavar="VECTORS")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--by", choices=("mi", "similarity"), default="mi")
    parser.add_argument("--keep", type=float, required=True, metavar="SHARE_OR_N")
    parser.add_argument("--clusters", type=_sizes, default=[100], metavar="K,...")
    parser.add_argument("--space", default="")
    parser.add_argument("--video-vectors", type=Path, metavar="VECTORS")
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        told = curate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{told['kept']} of {told['clips']} clips with sound and picture kept: {args.out}")
    if told["rows"]:
        print(f"{told['rows']} rows for make_shards: {args.out / 'kept.jsonl'}")
    else:
        print("no manifest: shards were embedded; name the one they were made of by --manifest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
