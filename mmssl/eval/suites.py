"""The evaluation commands: `mmssl eval retrieval|localize|bouncing RUN [key=value ...]`.

`quick` computes the same numbers on a part of the validation set while training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mmssl.eval import localize, measure, parts, report, results
from mmssl.eval.album import Album, Example, Shot
from mmssl.eval.embed import DenseRows, Encoded, Encoder, Rows, Want, collect
from mmssl.eval.measure import ItemTable, Protocol
from mmssl.eval.options import parse
from mmssl.eval.results import flat
from mmssl.eval.retrieval import top
from mmssl.specs import MaskedSpec, RunSpec, Spec
from mmssl.types import UserError

SUITES = {
    "retrieval": Want(embeddings=True, dense=False, match=False, masked=False),
    "localize": Want(embeddings=False, dense=True, match=False, masked=False),
    "bouncing": Want(),
}
_TRAINED, _RANDOM = "trained", "random"
_PICTURED = 1000  # clips whose pictures are kept for the report
_EXAMPLES, _SHOWN = 4, 5  # queries per direction in the report, items per query


class EvalSpec(Spec):
    """What can be set behind `mmssl eval SUITE RUN`."""

    which: Literal["ema", "best", "last"] = "ema"  # weights of the run, see `load_model`
    data: str = ""  # folder of shards; empty = the run's data.test
    limit: int = Field(0, ge=0)  # clips; 0 = all
    micro_batch: int = Field(32, gt=1)  # clips per batch
    seed: int = 0  # partners of the match score, swapped audio, bootstrap
    resamples: int = Field(1000, ge=0)  # of the bootstrap
    random: bool = True  # the same with random weights
    split_by: str = ""  # field of the clips' meta: every metric also on the clips of each value
    out: str = ""  # folder of the results and the report; empty = the run folder
    report: bool = True  # write the HTML report


def main(suite: str, run_dir: str, overrides: Sequence[str] = ()) -> None:
    """Evaluate a run, print the table, write `results.json`, `items.json` and `report.html`.

    `items.json` holds the values of every clip. The suites `retrieval` and `localize` add their
    name to the files': `results_<suite>.json`.

    Raises:
        UserError: unknown suite or option, no such run, no readable data.
    """
    if suite not in SUITES:
        raise UserError(f"unknown suite `{suite}`; choose one of {', '.join(SUITES)}")
    options = parse(EvalSpec, overrides)
    items = ItemTable()
    found, album = evaluate(suite, Path(run_dir), options, items)
    out, tail = Path(options.out or run_dir), "" if suite == "bouncing" else f"_{suite}"
    files = [out / f"results{tail}.json", out / f"items{tail}.json"]
    results.write(found, files[0])
    results.write(items.tree(), files[1])
    if options.report:
        files.append(out / f"report{tail}.html")
        report.write(found, album, Path(run_dir), files[-1])
    print(results.table(found))
    if suite == "bouncing":
        print(f"\n{results.verdicts(found)}")
    print("\nwritten:", *files)


def evaluate(
    suite: str, run: Path, options: EvalSpec, items: ItemTable | None = None
) -> tuple[results.Results, Album]:
    """Results of a suite on a run folder, with the pictures of the report.

    `items` takes the values of every clip.

    Raises:
        UserError: as `main`.
    """
    from mmssl import config
    from mmssl.data.ordered import eval_batches
    from mmssl.eval.load import load_model

    begin = time.perf_counter()
    model, spec, tokenizer = load_model(run, which=options.which)
    models: dict[str, Encoder] = {_TRAINED: model}
    if options.random:
        models[_RANDOM] = load_model(run, random=True)[0]
    folder = options.data or spec.data.test
    if not folder:
        raise UserError(f"{run}: the run names no `data.test`; give data=FOLDER")
    album = Album(limit=_PICTURED if options.report else 0)
    batches = eval_batches(
        folder, spec.data, spec.views, options.micro_batch, tokenizer, options.limit or None
    )
    want = SUITES[suite]
    wants = {_TRAINED: want, _RANDOM: Want(want.embeddings, want.dense, False, False)}
    rows, encoded = collect(models, batches, wants, options.seed, [album])
    protocol = Protocol(options.seed, options.resamples, items)
    found = facts(suite, options) | {
        "run": {"name": spec.name, "folder": str(run), "config": config.digest(spec)},
        "data": data_facts(folder, rows),
        "checkpoint": {
            "which": options.which,
            "sha256": results.weights_sha256(model.state_dict()),
        },
        "train": results.train_facts(run),
    }
    found |= numbers(rows, encoded[_TRAINED], model, spec, protocol, album)
    if options.random:
        alone = Protocol(options.seed, 0)
        found["random_encoder"] = numbers(rows, encoded[_RANDOM], models[_RANDOM], spec, alone)
    if options.split_by:
        found["split_by"], found["parts"] = options.split_by, {}
        for value, kept in parts.split(rows, options.split_by).items():
            few = parts.take(rows, encoded[_TRAINED], kept)
            part = protocol.of_part(value)
            found["parts"][value] = {"clips": len(kept), **numbers(*few, model, spec, part)}
    found["seconds"] = round(time.perf_counter() - begin, 1)
    return found, album


def facts(suite: str, options: EvalSpec) -> results.Results:
    """What a reader needs to repeat the evaluation."""
    return {
        "suite": suite,
        "protocol": results.PROTOCOL,
        "seed": options.seed,
        "resamples": options.resamples,
        "versions": results.versions(),
        "machine": results.machine(),
    }


def data_facts(folder: str | Path, rows: Rows) -> dict[str, Any]:
    """Folder, manifest hash and number of clips of each kind."""
    kinds = [str(meta.get("kind", "any")) for meta in rows.meta]
    return {
        "folder": str(folder),
        "manifest_sha256": results.manifest_sha256(folder),
        "n": len(rows.keys),
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def numbers(
    rows: Rows,
    encoded: Encoded,
    model: Encoder,
    spec: RunSpec,
    protocol: Protocol,
    album: Album | None = None,
) -> results.Results:
    """Every metric for which something was collected; fills the album's examples."""
    found: results.Results = {}
    if encoded.vectors:
        found["retrieval"] = measure.retrieval(rows, encoded, model.space_for, protocol)
        if album is not None:
            album.examples = examples(rows, encoded, model, album)
    if encoded.dense is not None and len(encoded.dense.rows_P):
        side = video_side(spec)
        truth = measure.scene(rows, encoded.dense, side, protocol.seed)
        maps = measure.localization_maps(model, encoded.dense, truth)
        found["localization"] = measure.localization(maps, rows, encoded.dense, truth, protocol)
        if album is not None:
            album.shots = shots(rows, encoded, maps, truth, album, side)
    match = measure.correspondence(rows, encoded, protocol)
    if match is not None:
        found["correspondence"] = match
    if encoded.masked:
        found["masked"] = measure.masked(encoded, masked_modalities(spec))
    return found


def video_side(spec: RunSpec) -> int:
    """Side of the pictures of the first video view, 0 = as stored."""
    return next((view.size for view in spec.views.values() if view.modality == "video"), 0)


def masked_modalities(spec: RunSpec) -> dict[str, str]:
    """Modality of each masked task."""
    return {
        name: spec.views[task.view].modality
        for name, task in spec.tasks.items()
        if isinstance(task, MaskedSpec)
    }


def quick(model: Encoder, spec: RunSpec, tokenizer: Any, clips: int) -> dict[str, float]:
    """Flat numbers on the first `clips` clips of the validation set, e.g. for early stopping.

    Keys look like "retrieval.audio->video.r_at_10", "localization.pointing_sounding",
    "correspondence.accuracy", "masked.audio.ratio". Numbers that cannot be computed are left out.

    Raises:
        UserError: the run names no validation data.
    """
    from mmssl.data.ordered import eval_batches

    if not spec.data.val:
        raise UserError("validate: the run names no `data.val`; set it or `validate.every: 0`")
    size = min(32, max(2, clips))
    batches = eval_batches(spec.data.val, spec.data, spec.views, size, tokenizer, clips)
    rows, encoded = collect({_TRAINED: model}, batches)
    return flat(numbers(rows, encoded[_TRAINED], model, spec, Protocol(0, 0)))


# --- pictures for the report


def examples(
    rows: Rows, encoded: Encoded, model: Encoder, album: Album
) -> dict[str, list[Example]]:
    """Evenly spaced queries of three directions with the items they find first."""
    found = {}
    for query, base in (("audio", "video"), ("text", "video"), ("video", "text")):
        names = {modality for modality, _ in encoded.vectors}
        space = model.space_for(query, base) if {query, base} <= names else None
        if space is not None:
            kept = _pictured(rows, encoded, (query, base), space, album)
            if len(kept):
                found[f"{query}->{base}"] = _ask(encoded, (query, base), space, kept)
    return found


def _pictured(
    rows: Rows, encoded: Encoded, pair: tuple[str, str], space: str, album: Album
) -> np.ndarray[Any, np.dtype[np.int64]]:
    there = measure.candidates(rows)
    for modality in pair:
        there = there & encoded.present[modality, space]
    return np.flatnonzero(there[: album.limit])


def _ask(
    encoded: Encoded, pair: tuple[str, str], space: str, kept: np.ndarray[Any, np.dtype[np.int64]]
) -> list[Example]:
    picks = np.unique(np.linspace(0, len(kept) - 1, _EXAMPLES).round().astype(int))
    query, base = (encoded.vectors[modality, space][kept] for modality in pair)
    order = top(query[picks], base, len(kept))
    return [
        Example(
            query=int(kept[pick]),
            found=[int(row) for row in kept[line[:_SHOWN]]],
            rank=int(np.flatnonzero(line == pick)[0]) + 1,
        )
        for pick, line in zip(picks, order, strict=True)
    ]


def shots(
    rows: Rows,
    encoded: Encoded,
    maps: Mapping[str, measure.Floats],
    truth: measure.Scene,
    album: Album,
    side: int,
) -> list[tuple[Shot, Shot | None]]:
    """The kept films with their own audio and with that of a clip of the silent object's class."""
    assert encoded.dense is not None  # the caller has maps
    row_P = encoded.dense.rows_P
    swaps = np.flatnonzero(truth.partners_P >= 0)
    place = {int(p): k for k, p in enumerate(swaps)}
    draw = _Shots(rows, encoded.dense, truth, album, side)
    found = []
    for p in (p for p, row in enumerate(row_P) if int(row) in album.clips):
        other = None
        if p in place:
            heard = int(row_P[truth.partners_P[p]])
            other = draw(p, maps["swapped"][place[p]], heard)
        found.append((draw(p, maps["own"][p], int(row_P[p])), other))
    return found


@dataclass(frozen=True)
class _Shots:
    """Makes the picture of one map; the boxes are those of the frame that is shown."""

    rows: Rows
    dense: DenseRows
    truth: measure.Scene
    album: Album
    side: int

    def __call__(self, p: int, map_TS: measure.Floats, heard: int) -> Shot:
        row, grid_HW = int(self.dense.rows_P[p]), self.truth.grid_HW
        boxes = self.truth.sounding_PT4[p : p + 1], self.truth.silent_PT4[p : p + 1]
        found = localize.point(map_TS[None], grid_HW, *boxes)
        marks = {"sounding": found.sounding_P, "silent": found.silent_P, "both": found.both_P}
        bin_s = float(self.dense.times_PT[p, found.bin_P[0]])
        time_s = self.album.clips[row].shown_at(bin_s)
        meta, at = self.rows.meta[row], np.asarray([time_s])
        return Shot(
            row=row,
            heard=heard,
            time_s=time_s,
            map_HW=map_TS[found.bin_P[0]].reshape(grid_HW),
            sounding=measure.box_track(meta, "sounding", self.side, at)[0],
            silent=measure.box_track(meta, "silent", self.side, at)[0],
            hit=next((name for name, mark in marks.items() if mark[0]), "neither"),
        )
