"""The evaluation commands: `mmssl eval SUITE RUN [key=value ...]`.

`quick` computes the same numbers on a part of the validation set while training goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmssl.eval import captions, localize, measure, parts, report, results, scenes
from mmssl.eval.album import Album, Example, Shot
from mmssl.eval.embed import DenseRows, Encoded, Encoder, Rows, Want, collect
from mmssl.eval.items import Protocol
from mmssl.eval.options import parse
from mmssl.eval.results import flat
from mmssl.eval.retrieval import CUTS, among, top
from mmssl.eval.session import RANDOM, TRAINED, Session, SuiteSpec
from mmssl.eval.tables import Pair
from mmssl.specs import MaskedSpec, RunSpec
from mmssl.types import UserError

SUITES = {
    "retrieval": Want(embeddings=True, dense=False, match=False, masked=False, maps=True),
    "localize": Want(embeddings=False, dense=True, match=False, masked=False),
    "bouncing": Want(),
}
# suites that collect other things: each module has its `Options` and `evaluate(session)`
MODULES = {
    "probe": "mmssl.eval.probe",
    "knn": "mmssl.eval.knn",
    "finetune": "mmssl.eval.finetune",
    "boxes": "mmssl.eval.boxes",
    "sync": "mmssl.eval.sync",
    "abx": "mmssl.eval.abx",
    "units": "mmssl.eval.unit_suite",
    "separation": "mmssl.eval.separation",
}
_PICTURED = 1000  # clips whose pictures are kept for the report
_ASKED = ("audio->video", "text->video", "video->text")  # directions of the report's examples
_EXAMPLES, _SHOWN = 4, 5  # queries per direction in the report, items per query


class EvalSpec(SuiteSpec):
    """What can be set behind `mmssl eval retrieval|localize|bouncing RUN`."""

    split_by: str = ""  # field of the clips' meta: every metric also on the clips of each value
    captions: Literal["first", "all"] = "first"  # `all`: beside it, retrieval with every caption
    dual_softmax: float = Field(0.0, ge=0)  # scale; above 0: retrieval also re-weighted by it
    map_clips: int = Field(1000, ge=1)  # retrieval by map scores is refused above, see `tables`


def main(suite: str, run_dir: str, overrides: Sequence[str] = ()) -> None:
    """Evaluate a run, print the table, write `results.json`, `items.json` and `report.html`.

    `items.json` holds the values of every clip. All suites but `bouncing` add their name to the
    files': `results_<suite>.json`.

    Raises:
        UserError: unknown suite or option, no such run, no readable data.
    """
    if suite not in SUITES and suite not in MODULES:
        known = ", ".join([*SUITES, *MODULES])
        raise UserError(f"unknown suite `{suite}`; choose one of {known}")
    if suite in MODULES:
        module = importlib.import_module(MODULES[suite])
        session = Session.open(Path(run_dir), parse(module.Options, overrides))
        found, album = module.evaluate(session), Album()
    else:
        session = Session.open(Path(run_dir), parse(EvalSpec, overrides))
        found, album = evaluate(suite, session)
    files = session.write(
        suite, found, lambda path: report.write(found, album, Path(run_dir), path)
    )
    print(results.table(found))
    if suite == "bouncing":
        print(f"\n{results.verdicts(found)}")
    print("\nwritten:", *files)


def evaluate(suite: str, session: Session) -> tuple[results.Results, Album]:
    """Results of a suite on a run, with the pictures of the report.

    Raises:
        UserError: as `main`.
    """
    options, spec, models = session.options, session.spec, session.models
    assert isinstance(options, EvalSpec)
    album = Album(limit=_PICTURED if options.report else 0)
    want = SUITES[suite]
    if options.split_by:
        session.check_fields(split_by=options.split_by)
    if want.maps:
        check_cost(session.clips, options.map_clips, models[TRAINED].map_pairs())
    wants = {TRAINED: want, RANDOM: replace(want, match=False, masked=False)}
    rows, encoded = collect(models, session.batches(), wants, options.seed, [album])
    found = session.facts(suite, rows.meta)
    protocol = replace(session.protocol, dual_softmax=options.dual_softmax)
    found |= numbers(rows, encoded[TRAINED], models[TRAINED], spec, protocol, album)
    if options.random:
        alone = Protocol(options.seed, 0)
        found["random_encoder"] = numbers(rows, encoded[RANDOM], models[RANDOM], spec, alone)
    if options.captions == "all" and "retrieval" in found:
        for name, tree in ((TRAINED, found), (RANDOM, found.get("random_encoder"))):
            if tree is not None:
                said = captions.encode(session, rows, models[name])
                tree["captions"] = captions.retrieval(rows, encoded[name], said, models[name])
    if options.split_by:
        found["split_by"], found["parts"] = options.split_by, {}
        for value, kept in parts.split(rows, options.split_by).items():
            few = parts.take(rows, encoded[TRAINED], kept)
            part = protocol.of_part(value)
            found["parts"][value] = {
                "clips": len(kept),
                **numbers(*few, models[TRAINED], spec, part),
            }
    found["plots"] = plots(found)
    return found, album


def check_cost(clips: int, most: int, pairs: Sequence[Pair]) -> None:
    """Refuse tables of map scores of too many clips.

    Raises:
        UserError: `clips` exceeds `most`, and `pairs` of modalities have such tables.
    """
    if pairs and clips > most:
        names = ", ".join(" and ".join(pair) for pair in pairs)
        raise UserError(
            f"retrieval: only map scores relate {names}, and {clips} clips make {clips} x {clips} "
            f"maps, more than map_clips={most} allows; give limit={most}, or map_clips={clips} "
            "if memory and time suffice"
        )


def plots(found: results.Results) -> list[results.Results]:
    """Hit rate by cut, and the share of well placed maps by the level that cuts them."""
    drawn = []
    for key, title in (
        ("retrieval", "Own clip"),
        ("captions", "With all captions: a relevant one"),
    ):
        rows = {name: row for name, row in (found.get(key) or {}).items() if row["n"]}
        lines = {name: [row[f"r_at_{k}"] for k in CUTS] for name, row in rows.items()}
        if lines:
            drawn.append(results.plot(f"{title} among the first k", "k", CUTS, lines))
    table = results.lookup(found, "localization.ciou") or {}
    parts = {name: row for name, row in table.items() if isinstance(row, dict)}
    curves = {name: row["curve"] for name, row in parts.items() if "curve" in row}
    if curves:
        title, x = "Share of clips with cIoU of at least 0.5", curves["model"]["level"]
        lines = {name: curve["at_0.5"] for name, curve in curves.items()}
        drawn.append(results.plot(title, "level of the map", x, lines))
    return drawn


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
    if encoded.vectors or encoded.tables:
        found["retrieval"] = measure.retrieval(rows, encoded, model.space_for, protocol)
        if album is not None:
            album.examples = examples(rows, encoded, model, album)
    if encoded.dense is not None and len(encoded.dense.rows_P):
        side = video_side(spec)
        truth = scenes.scene(rows, encoded.dense, side, protocol.seed)
        maps = scenes.localization_maps(model, encoded.dense, truth)
        found["localization"] = scenes.localization(maps, rows, encoded.dense, truth, protocol)
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
    rows, encoded = collect({TRAINED: model}, batches)
    return flat(numbers(rows, encoded[TRAINED], model, spec, Protocol(0, 0)))


# --- pictures for the report


def examples(
    rows: Rows, encoded: Encoded, model: Encoder, album: Album
) -> dict[str, list[Example]]:
    """Evenly spaced queries of three directions with the items they find first."""
    found = {}
    for name, _, rows_P, sides in measure.compared(rows, encoded, model.space_for):
        kept = rows_P[rows_P < album.limit]
        if name in _ASKED and len(kept):
            found[name] = _ask(*among(*sides, np.arange(len(kept))), kept)
    return {name: found[name] for name in _ASKED if name in found}


def _ask(query: NDArray[Any], base: NDArray[Any] | None, kept: NDArray[np.int64]) -> list[Example]:
    picks = np.unique(np.linspace(0, len(kept) - 1, _EXAMPLES).round().astype(int))
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
    maps: Mapping[str, scenes.Floats],
    truth: scenes.Scene,
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
    truth: scenes.Scene
    album: Album
    side: int

    def __call__(self, p: int, map_TS: scenes.Floats, heard: int) -> Shot:
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
            sounding=scenes.box_track(meta, "sounding", self.side, at)[0],
            silent=scenes.box_track(meta, "silent", self.side, at)[0],
            hit=next((name for name, mark in marks.items() if mark[0]), "neither"),
        )
