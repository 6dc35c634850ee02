"""`mmssl eval boxes RUN [annotations=FILE]`: a still map of each clip against boxes, by cIoU.

The protocols of VGG-SS and Flickr-SoundNet: three rules, the curve, pointing, answers without a
model or without the right sound, and whether a silent or off-screen sound is told from a visible
one. Without annotations the boxes are those of the clips' meta. Whole clips are read, each view's
own crop is taken around the annotated moment. Left out of the protocols: IIoU, the interactive
score of pictures with two sources, where both must be found.

Letters in shapes: N clips with boxes, T time bins, S cells, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mmssl.eval import ciou, decide, localize, scenes
from mmssl.eval.annotations import Annotations, read_annotations
from mmssl.eval.bootstrap import interval
from mmssl.eval.embed import DenseRows, Encoder, Rows, dense_rows, first_view, frozen, join_dense
from mmssl.eval.features import cut, whole_views
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, SuiteSpec, progress
from mmssl.specs import ViewSpec
from mmssl.types import Batch, UserError, ViewBatch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RULES = ("relative", "absolute", "adaptive")


class Options(SuiteSpec):
    """What can be set behind `mmssl eval boxes RUN`."""

    annotations: str = ""  # JSON of VGG-SS, or folder of Flickr-SoundNet; empty = `boxes` in meta
    name: str = "source"  # field of the clips' meta that the annotations name them by
    at_s: float = Field(-1.0, ge=-1)  # time of the annotated frame (s); -1 = middle of the clip


@dataclass
class Scenes:
    """The clips with boxes: ground truth maps, saliency of the frame, and local features.

    dense, silent: by model, the latter with silence as sound. bins_N: time bin of the frame.
    """

    rows: Rows = field(default_factory=Rows)
    truths: list[Floats] = field(default_factory=list)
    saliency: list[Floats] = field(default_factory=list)
    dense: dict[str, DenseRows] = field(default_factory=dict)
    silent: dict[str, DenseRows] = field(default_factory=dict)
    absent: int = 0  # clips without sound or pictures; the others are counted among the rest
    unmatched: int = 0
    empty: int = 0

    def still(self, model: Encoder, dense: DenseRows, at_N: Floats, audio: Any) -> Floats:
        """(N, H, W) maps at the annotated frames, with the sound of `audio` (steps, validity)."""
        maps_NTS = scenes.score_maps(model, dense.video_PTSD, *audio)
        bin_N = np.abs(dense.times_PT - at_N[:, None]).argmin(axis=1)
        picked_NS = maps_NTS[np.arange(len(bin_N)), bin_N]
        return np.asarray(picked_NS.reshape(-1, *dense.grid[1:]))


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: no clip with boxes, annotations that cannot be read, a method without local
            scores, or a map that is of another time than the boxes.
    """
    options = cast("Options", session.options)
    session.view_of("audio"), session.view_of("video")
    drawn = read_annotations(Path(options.annotations)) if options.annotations else None
    found_in, metas = collect(session, options, drawn)
    at_N = np.asarray([moment(meta, options.at_s) for meta in found_in.rows.meta])
    result = session.facts("boxes", metas)
    maps = maps_of(session, found_in, at_N, TRAINED)
    table, values = measured(maps, found_in)
    facts = {"n": len(found_in.truths), "absent": found_in.absent}
    facts |= {"unmatched": found_in.unmatched, "empty": found_in.empty}
    facts["n_wrong_audio"] = int((strangers(found_in.rows, options.seed) >= 0).sum())
    result["boxes"] = {**table, **facts, "decision": decision(session, maps, values, found_in)}
    if session.options.resamples:
        result["boxes"]["ci"] = _bounds(session, values["model"], found_in)
    record = session.items.recorder("boxes", found_in.rows, np.arange(len(found_in.truths)))
    for name, column in values["model"].items():
        record(name, column)
    if RANDOM in session.models:
        guess, _ = measured(
            {"model": maps_of(session, found_in, at_N, RANDOM)["model"]}, found_in, False
        )
        result["random_encoder"] = {"boxes": guess}
        table = {**table, "random weights": guess["model"]}
    result["plots"] = _plots(table, result["boxes"])
    return result


def moment(meta: Mapping[str, Any], at_s: float) -> float:
    """Time of the annotated frame (s)."""
    return float(meta.get("duration_s", 0.0)) / 2 if at_s < 0 else at_s


# --- reading


def around(batch: Batch, views: Mapping[str, ViewSpec], at_B: Floats) -> Batch:
    """Whole clips -> each view of a fixed length cut to its own around these times (s).

    Cuts stay inside the clip; of two equally near frames the earlier one is taken.
    """
    found = {
        name: _around(view, views[name], at_B) if views[name].crop_s else view
        for name, view in batch.views.items()
        if view.modality != "text"
    }
    return replace(batch, views=batch.views | found)


def _around(view: ViewBatch, spec: ViewSpec, at_B: Floats) -> ViewBatch:
    length = max(1, round(spec.crop_s * view.rate))
    rows_P, own_P = view.rows_P.numpy(), view.start_s_P.double().numpy()
    first_P = np.ceil((at_B[rows_P] - own_P) * view.rate - length / 2)
    room_P = np.maximum(view.lengths_P.numpy() - length, 0)
    start_B = np.zeros(len(at_B))
    start_B[rows_P] = own_P + np.clip(first_P, 0, room_P) / view.rate
    found = cut(view, spec, start_B)
    return replace(found, lengths_P=found.lengths_P.minimum(view.lengths_P))


def collect(
    session: Session, options: Options, drawn: Annotations | None
) -> tuple[Scenes, list[dict[str, Any]]]:
    """The clips with boxes, and the meta of all clips."""
    found, metas = Scenes(), []
    side = next(v.size for v in session.spec.views.values() if v.modality == "video")
    dense: dict[str, list[DenseRows]] = {name: [] for name in session.models}
    silent: dict[str, list[DenseRows]] = {name: [] for name in session.models}
    with frozen(session.models.values()):
        for whole in session.batches(whole_views(session.spec.views)):
            at_B = np.asarray([moment(meta, options.at_s) for meta in whole.meta])
            batch = around(whole, session.spec.views, at_B)
            metas += batch.meta
            both = [i for i in range(batch.size) if _both(batch, i)]
            truths = {i: _truth(batch.meta[i], options, drawn, side) for i in both}
            there = [i for i, truth in truths.items() if truth is not None and truth.any()]
            unmatched = sum(truth is None for truth in truths.values())
            found.absent += batch.size - len(both)
            found.unmatched += unmatched
            found.empty += len(both) - unmatched - len(there)
            if not there:
                continue
            for name, model in session.models.items():
                device = next(iter(model.parameters())).device
                dense[name].append(_dense(model, batch.to(device), there, at_B))
                quiet = _silenced(batch).to(device)
                silent[name].append(_dense(model, quiet, there, at_B))
            found.rows.add_some(batch, there)
            found.truths += [cast("Floats", truths[i]) for i in there]
            found.saliency += [_saliency(batch, i, at_B[i]) for i in there]
    if not found.truths:
        raise UserError(
            f"{session.folder}: no clip with sound, pictures and boxes ({found.absent} lack "
            f"sound or pictures, {found.unmatched} boxes, {found.empty} have theirs "
            "outside the picture the model sees); "
            + (
                f"the annotations name clips by another field than name={options.name}"
                if drawn
                else "give annotations=FILE"
            )
        )
    found.dense = {name: join_dense(parts) for name, parts in dense.items()}
    found.silent = {name: join_dense(parts) for name, parts in silent.items()}
    return found, metas


def _truth(
    meta: Mapping[str, Any], options: Options, drawn: Annotations | None, side: int
) -> Floats | None:
    """Weight map of a clip as the model sees it, None without boxes."""
    if drawn is None:
        if not (meta.get("boxes") or {}).get("sounding"):
            return None
        at = np.asarray([moment(meta, options.at_s)])
        return ciou.weight_map(scenes.box_track(dict(meta), "sounding", side, at))
    boxes_K4 = drawn.boxes.get(str(meta.get(options.name)))
    if boxes_K4 is None:
        return None
    width, height = meta["stored_size"]
    pixels = boxes_K4 * np.asarray([width, height, width, height])
    return ciou.weight_map(localize.to_view(pixels, (width, height), side), drawn.consensus)


def _both(batch: Batch, row: int) -> bool:
    views = (first_view(batch, modality) for modality in ("audio", "video"))
    return all(view is not None and bool(view.present_B[row]) for view in views)


def _dense(model: Encoder, batch: Batch, rows: list[int], at_B: Floats) -> DenseRows:
    found = dense_rows(model, batch, rows, 0)
    if found is None:
        raise UserError(
            "boxes: the run's method has no map score (a `pairs` entry with score `map`), so it "
            "cannot say where a sound comes from"
        )
    if len(found.rows_P) != len(rows):
        raise ValueError("boxes: a clip with sound and pictures has no local features")
    film = first_view(batch, "video")
    assert film is not None  # `_both` has found it
    half_s = film.data.shape[1] / film.rate / found.grid[0] / 2
    away_P = np.abs(found.times_PT - at_B[rows][:, None]).min(axis=1)
    worst = int(away_P.argmax())
    if away_P[worst] > half_s + 1e-3:  # times are single precision
        raise UserError(
            f"boxes: {batch.keys[rows[worst]]}: the boxes are of {at_B[rows[worst]]:g} s, but the "
            f"nearest time bin of the map is {away_P[worst]:g} s away, more than half a bin "
            f"({half_s:g} s); give at_s= inside the pictures, or leave the clip out"
        )
    return found


def _silenced(batch: Batch) -> Batch:
    views = {
        name: replace(view, data=torch.zeros_like(view.data)) if view.modality == "audio" else view
        for name, view in batch.views.items()
    }
    return replace(batch, views=views)


def _saliency(batch: Batch, row: int, at_s: float) -> Floats:
    """Of the frame nearest to a time (s)."""
    view = first_view(batch, "video")
    assert view is not None  # `_both` has found it
    item = int((view.rows_P == row).nonzero()[0, 0])
    frame = math.ceil((at_s - float(view.start_s_P[item])) * view.rate - 0.5)
    frame = min(max(frame, 0), int(view.lengths_P[item]) - 1)
    return ciou.spectral_residual(view.data[item, frame].cpu().numpy())


# --- measuring


def maps_of(session: Session, found: Scenes, at_N: Floats, name: str) -> dict[str, Floats]:
    """(N, H, W) maps by sound: `model` (its own), `wrong_audio`, `averaged_audio`, `silence`.

    Clips for which there is no other sound (of another source, and class where known) keep their
    own as `wrong_audio`; `strangers` tells which.
    """
    model, dense = session.models[name], found.dense[name]
    other_N = strangers(found.rows, session.options.seed)
    other_N = np.where(other_N < 0, np.arange(len(other_N)), other_N)
    audio, valid = dense.audio_PAD, dense.valid_PA
    sounds = {
        "model": (audio, valid),
        "wrong_audio": (audio[other_N], valid[other_N]),
        "averaged_audio": scenes.blind_audio(audio, valid),
        "silence": (found.silent[name].audio_PAD, found.silent[name].valid_PA),
    }
    return {key: found.still(model, dense, at_N, sound) for key, sound in sounds.items()}


def strangers(rows: Rows, seed: int) -> Ints:
    """(N,) a random clip of another source, and of another class where known; -1 = none."""
    sources = np.asarray(rows.sources)
    classes = np.asarray([str(meta.get("class", i)) for i, meta in enumerate(rows.meta)])
    rng, found = np.random.default_rng(seed), []
    for source, name in zip(sources, classes, strict=True):
        fits = np.flatnonzero((sources != source) & (classes != name))
        found.append(int(rng.choice(fits)) if len(fits) else -1)
    return np.asarray(found, dtype=np.int64)


def measured(
    maps: Mapping[str, Floats], found: Scenes, trivial: bool = True
) -> tuple[Metrics, dict[str, dict[str, Floats]]]:
    """CIoU and pointing of each kind of map, and the values of every clip by kind and measure.

    trivial: also `saliency` of the picture alone, `center` and `whole_image`.
    """
    pictures: dict[str, Sequence[Floats]] = {
        name: [ciou.upsample(map_HW) for map_HW in maps_NHW]
        for name, maps_NHW in maps.items()
        if name != "silence"
    }
    if trivial:
        pictures["saliency"] = [ciou.upsample(map_HW) for map_HW in found.saliency]
        pictures["center"] = [ciou.centre_map()] * len(found.truths)
    table: Metrics = {}
    values: dict[str, dict[str, Floats]] = {}
    for name, drawn in progress(pictures.items(), "cIoU", len(pictures)):
        table[name] = ciou.ciou_summary(drawn, found.truths)
        hits = [ciou.pointing_game(h, g) for h, g in zip(drawn, found.truths, strict=True)]
        values[name] = {
            **ciou.ciou_values(drawn, found.truths),
            "pointing": np.asarray(hits, float),
        }
        table[name]["pointing"] = float(np.mean(hits))
    if trivial:
        whole = [ciou.ciou(np.ones(g.shape, dtype=bool), g) for g in found.truths]
        share = float(np.mean([(g > 0).mean() for g in found.truths]))
        table["whole_image"] = ciou.rates(whole) | {"pointing": share}
    return table, values


def decision(
    session: Session,
    maps: Mapping[str, Floats],
    values: Mapping[str, Mapping[str, Floats]],
    found: Scenes,
) -> Metrics:
    """Is the source of the sound to be seen? Silence and sounds from elsewhere deserve a no.

    The threshold on a map's confidence is chosen on a random half of the sources and tested on the
    other; by rule also AP and the greatest F1 of localization with such negatives.
    """
    sure = {name: confidence(maps_NHW) for name, maps_NHW in maps.items()}
    fits = strangers(found.rows, session.options.seed) >= 0
    sources = np.asarray(found.rows.sources)[fits]
    first = decide.halves(sources, session.options.seed)
    if first.all() or not fits.any():
        return {"n": 0, "threshold": None}
    yes, off = sure["model"][fits], sure["wrong_audio"][fits]
    silent = sure["silence"][fits]
    result = decide.calibrated(yes, {"silence": silent, "off_screen": off}, first)
    none = np.concatenate([silent, off])
    for rule in RULES:
        placed = values["model"][rule][fits] >= 0.5
        result[rule] = decide.with_negatives(yes, placed, none) | {"loc_acc": float(placed.mean())}
    return result


def confidence(maps_NHW: Floats) -> Floats:
    """(N,) mean of the top quarter of each map's scores."""
    flat = np.sort(maps_NHW.reshape(len(maps_NHW), -1), axis=1)[:, ::-1]
    return np.asarray(flat[:, : max(1, flat.shape[1] // 4)].mean(axis=1))


def _bounds(session: Session, own: Mapping[str, Floats], found: Scenes) -> Metrics:
    options, sources = session.options, np.asarray(found.rows.sources)
    columns = {f"{rule}.at_0.5": (own[rule] >= 0.5).astype(float) for rule in RULES}
    columns["pointing"] = own["pointing"]
    return {
        name: list(interval(column, sources, "mean", options.resamples, options.seed))
        for name, column in columns.items()
    }


def _plots(table: Mapping[str, Any], own: Metrics) -> list[Results]:
    x = [f"{rule} ≥ 0.5" for rule in RULES] + [f"{rule} AUC" for rule in RULES] + ["pointing"]
    lines, curves = {}, {}
    for name, row in table.items():
        parts = [row.get(rule, row) for rule in RULES]
        lines[name] = [*(p["at_0.5"] for p in parts), *(p["auc"] for p in parts), row["pointing"]]
        if "curve" in row:
            curves[name] = row["curve"]["at_0.5"]
    keys = [f"{rule}.at_0.5" for rule in RULES] + [""] * len(RULES) + ["pointing"]
    bounds = {"model": [interval_of(own, key) for key in keys]}
    levels = next(iter(table.values()))["curve"]["level"]
    return [
        plot(
            "Share of clips with cIoU of at least 0.5, area under its curve, pointing",
            "",
            x,
            lines,
            bounds,
        ),
        plot("Share of clips with cIoU of at least 0.5", "level of the map", levels, curves),
    ]
