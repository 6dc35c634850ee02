"""From collected outputs to numbers: retrieval, localization, correspondence, masked prediction.

Letters in shapes: N rows of the test set, P rows with boxes, T time bins, S cells, A audio steps, D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mmssl.eval import ciou, localize
from mmssl.eval.bootstrap import interval
from mmssl.eval.embed import DenseRows, Encoded, Encoder, Rows
from mmssl.eval.retrieval import Items, direction
from mmssl.types import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Metrics = dict[str, Any]

ORDER = ("audio", "video", "text")
_MAPS = 64  # clips per block of score maps
_MISSING_SHOWN = 20


@dataclass
class ItemTable:
    """Values of single clips, so that runs can be pooled over folds and compared in pairs.

    values: metric -> clip key -> value; sources: clip key -> source recording; parts: the same by
    part of the test set, where it was split.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    parts: dict[str, ItemTable] = field(default_factory=dict)

    def tree(self) -> Metrics:
        """Plain data for a file."""
        tree: Metrics = {"sources": self.sources, "values": self.values}
        if self.parts:
            tree["parts"] = {name: part.values for name, part in self.parts.items()}
        return tree

    def add(self, metric: str, rows: Rows, kept: Iterable[int], values: ArrayLike) -> None:
        """Note the value of each of the kept rows."""
        column = self.values.setdefault(metric, {})
        for row, value in zip(kept, np.asarray(values).tolist(), strict=True):
            column[rows.keys[row]] = float(value)
            self.sources[rows.keys[row]] = str(rows.meta[row].get("source", rows.sources[row]))

    def recorder(
        self, prefix: str, rows: Rows, kept: NDArray[np.int64]
    ) -> Callable[[str, ArrayLike], None]:
        """`add` for metrics of one prefix and fixed rows."""

        def record(name: str, values: ArrayLike) -> None:
            self.add(f"{prefix}.{name}", rows, kept, values)

        return record


@dataclass(frozen=True)
class Protocol:
    """Seed and size of everything random in the metrics; `items` takes the values of every clip."""

    seed: int = 0
    resamples: int = 1000
    items: ItemTable | None = None

    def of_part(self, name: str) -> Protocol:
        """The same for a part of the test set; its clips get a table of their own."""
        if self.items is None:
            return self
        return replace(self, items=self.items.parts.setdefault(name, ItemTable()))


# --- retrieval


def retrieval(
    rows: Rows, encoded: Encoded, space_for: Callable[[str, str], str | None], protocol: Protocol
) -> Metrics:
    """All directions between modalities that share a space, on the rows with one object.

    Rows whose `kind` is "two" are left out: their pictures hold two right answers.
    """
    names = {modality for modality, _ in encoded.vectors}
    ordered = [m for m in ORDER if m in names] + sorted(names - set(ORDER))
    result = {}
    for query, base in permutations(ordered, 2):
        space = space_for(query, base)
        if space is not None:
            result[f"{query}->{base}"] = _one_direction(
                rows, encoded, (query, base), space, protocol
            )
    return result


def candidates(rows: Rows) -> Bools:
    """(N,) rows that take part in retrieval."""
    return np.asarray([meta.get("kind") != "two" for meta in rows.meta], dtype=bool)


def _one_direction(
    rows: Rows, encoded: Encoded, pair: tuple[str, str], space: str, protocol: Protocol
) -> Metrics:
    asked = candidates(rows)
    there = asked & encoded.present[pair[0], space] & encoded.present[pair[1], space]
    kept = np.flatnonzero(there)
    missing = [rows.keys[i] for i in np.flatnonzero(asked & ~there)]
    if len(kept) == 0:
        return {"n": 0, "missing": missing[:_MISSING_SHOWN], "n_missing": len(missing)}
    items = _items(rows, kept, with_text="text" in pair)
    query, base = (encoded.vectors[modality, space][kept] for modality in pair)
    record = None
    if protocol.items is not None:
        record = protocol.items.recorder(f"retrieval.{pair[0]}->{pair[1]}", rows, kept)
    numbers = direction(query, base, items, protocol.resamples, protocol.seed, record=record)
    return numbers | {
        "missing": missing[:_MISSING_SHOWN],
        "n_missing": len(missing),
        "space": space,
    }


def _items(rows: Rows, kept: NDArray[np.int64], with_text: bool) -> Items:
    meta = [rows.meta[i] for i in kept]
    classes = groups = None
    if all(m.get("class") is not None for m in meta):
        classes = np.asarray([str(m["class"]) for m in meta])
        if all(m.get("size") is not None for m in meta):
            groups = np.asarray([f"{m['class']}/{m['size']}" for m in meta])
    return Items(
        sources_N=np.asarray(rows.sources)[kept],
        classes_N=classes,
        texts_N=np.asarray(rows.texts)[kept] if with_text else None,
        groups_N=groups,
    )


# --- localization


@dataclass(frozen=True)
class Scene:
    """Ground truth of the P localization rows on the grid of the score maps."""

    grid_HW: tuple[int, int]
    sounding_PT4: Floats
    silent_PT4: Floats
    sources_P: NDArray[np.generic]
    partners_P: NDArray[np.int64]


def scene(rows: Rows, dense: DenseRows, side: int, seed: int) -> Scene:
    """Boxes at the time bins, and for each clip another one that sounds like its silent object.

    Args:
        rows: the whole test set.
        dense: the rows with boxes.
        side: side of the picture the model sees, 0 = as stored.
        seed: of the choice of the other clip.
    """
    meta = [rows.meta[i] for i in dense.rows_P]
    tracks = {
        name: np.stack(
            [box_track(m, name, side, t) for m, t in zip(meta, dense.times_PT, strict=True)]
        )
        for name in ("sounding", "silent")
    }
    sources = [rows.sources[i] for i in dense.rows_P]
    partners_P = localize.partners(
        [m.get("silent_class") for m in meta],
        [m.get("class") for m in meta],
        sources,
        sources,
        seed,
    )
    grid_HW = (dense.grid[1], dense.grid[2])
    return Scene(grid_HW, tracks["sounding"], tracks["silent"], np.asarray(sources), partners_P)


def box_track(meta: Metrics, name: str, side: int, times_T: Floats) -> Floats:
    """(T, 4) box of an object at the given times (s), as places in the picture the model sees.

    Raises:
        UserError: the boxes lack their frame rate or do not fit their frame.
    """
    boxes = meta["boxes"]
    if not boxes.get("fps"):
        raise UserError("localization: `boxes` of a clip lacks `fps`, the boxes per second")
    width, height = boxes.get("frame") or meta["stored_size"]
    pixels = np.asarray(boxes[name], dtype=np.float64)
    if (pixels[:, 2:] > np.asarray([width, height]) + 1).any():
        raise UserError(
            f"boxes reach beyond the frame of {width} x {height} pixels; if the video "
            "was scaled, give `boxes` the entry `frame`: [width, height] of the unscaled frame"
        )
    places = localize.to_view(pixels, (width, height), side)
    return localize.boxes_at(places, float(boxes["fps"]), times_T)


def score_maps(model: Encoder, video_PTSD: Tensor, audio_PAD: Tensor, valid_PA: Tensor) -> Floats:
    """(P, T, S) maps of paired rows, in blocks."""
    device = next(iter(model.parameters())).device
    blocks = []
    for begin in range(0, len(video_PTSD), _MAPS):
        part = (x[begin : begin + _MAPS].to(device) for x in (video_PTSD, audio_PAD, valid_PA))
        with torch.inference_mode():
            blocks.append(model.score_maps(*part).double().cpu().numpy())
    return np.concatenate(blocks)


def blind_audio(audio_PAD: Tensor, valid_PA: Tensor) -> tuple[Tensor, Tensor]:
    """The test set's mean audio as every row's audio: (P, A, D) and its validity.

    Each step is the mean over the clips, brought back to the mean length of the true features, so
    that only the direction, not the scale of the scores, is changed.
    """
    weight_PA1 = valid_PA[..., None].to(audio_PAD.dtype)
    mean_AD = (audio_PAD * weight_PA1).sum(0) / weight_PA1.sum(0).clamp(min=1)
    length = audio_PAD.norm(dim=-1)[valid_PA].mean()
    mean_AD = mean_AD / mean_AD.norm(dim=-1, keepdim=True).clamp(min=1e-12) * length
    return mean_AD.expand_as(audio_PAD), valid_PA.any(dim=0).expand_as(valid_PA)


def localization_maps(model: Encoder, dense: DenseRows, truth: Scene) -> dict[str, Floats]:
    """Score maps (P, T, S) by audio: `own`, `swapped` (rows with a partner only), `blind`."""
    swaps = np.flatnonzero(truth.partners_P >= 0)
    other = truth.partners_P[swaps]
    video, audio, valid = dense.video_PTSD, dense.audio_PAD, dense.valid_PA
    maps = {"own": score_maps(model, video, audio, valid)}
    maps["blind"] = score_maps(model, video, *blind_audio(audio, valid))
    if len(swaps):
        maps["swapped"] = score_maps(model, video[swaps], audio[other], valid[other])
    return maps


def localization(
    maps: dict[str, Floats], rows: Rows, dense: DenseRows, truth: Scene, protocol: Protocol
) -> Metrics:
    """Pointing with the own, the swapped and the averaged audio, trivial answers, and cIoU.

    A value of None means that no clip could be tested (no clip of the silent object's class).
    """
    boxes = (truth.sounding_PT4, truth.silent_PT4)
    own = localize.point(maps["own"], truth.grid_HW, *boxes)
    blind = localize.point(maps["blind"], truth.grid_HW, *boxes)
    frames_PT = localize.point_frames(maps["own"], truth.grid_HW, *boxes)
    columns: dict[str, tuple[NDArray[Any], NDArray[np.generic]]] = {
        "pointing_sounding": (own.sounding_P, truth.sources_P),
        "pointing_silent": (own.silent_P, truth.sources_P),
        "pointing_both": (own.both_P, truth.sources_P),
        "pointing_frames": (
            frames_PT[dense.loud_PT],
            np.repeat(truth.sources_P, dense.loud_PT.sum(axis=1)),
        ),
        "pointing_audio_blind": (blind.sounding_P, truth.sources_P),
        "pointing_center": (localize.point_centre(*boxes), truth.sources_P),
        "pointing_whole_image": (
            localize.point_anywhere(truth.grid_HW, *boxes),
            truth.sources_P,
        ),
    }
    columns |= _swapped_columns(maps, truth)
    if protocol.items is not None:
        _record_pointing(protocol.items, rows, dense, truth, columns)
    result: Metrics = {name: _mean(values) for name, (values, _) in columns.items()}
    result |= {"n": len(truth.sources_P), "n_swapped": int((truth.partners_P >= 0).sum())}
    result["n_frames"] = int(dense.loud_PT.sum())
    result["ciou"] = _still_maps(maps, own, truth)
    if protocol.resamples:
        result["ci"] = {
            name: _bounds(interval(values, sources, "mean", protocol.resamples, protocol.seed))
            for name, (values, sources) in columns.items()
        }
    return result


def _record_pointing(
    items: ItemTable,
    rows: Rows,
    dense: DenseRows,
    truth: Scene,
    columns: Mapping[str, tuple[NDArray[Any], NDArray[np.generic]]],
) -> None:
    swapped = dense.rows_P[truth.partners_P >= 0]
    for name in ("sounding", "silent", "audio_blind", "center", "swapped_audio"):
        kept = swapped if name == "swapped_audio" else dense.rows_P
        items.add(f"localization.pointing_{name}", rows, kept, columns[f"pointing_{name}"][0])


def _swapped_columns(
    maps: dict[str, Floats], truth: Scene
) -> dict[str, tuple[NDArray[Any], NDArray[np.generic]]]:
    """With audio of the silent object's class the peak should move to the silent object."""
    rows = np.flatnonzero(truth.partners_P >= 0)
    sources = truth.sources_P[rows]
    names = ("pointing_swapped_audio", "pointing_swapped_stays")
    if len(rows) == 0:
        return {name: (np.zeros(0), sources) for name in names}
    found = localize.point(
        maps["swapped"], truth.grid_HW, truth.sounding_PT4[rows], truth.silent_PT4[rows]
    )
    return dict(zip(names, ((found.silent_P, sources), (found.sounding_P, sources)), strict=True))


def _still_maps(maps: dict[str, Floats], own: localize.Pointing, truth: Scene) -> Metrics:
    """CIoU of the time bin with the highest cell, beside what needs no model or no sound."""
    shapes = {"model": maps["own"], "audio_blind": maps["blind"]}
    rows = np.arange(len(own.bin_P))
    weights = [ciou.weight_map(truth.sounding_PT4[p, own.bin_P[p]][None]) for p in rows]
    kept = [p for p in rows if weights[p].any()]
    truths = [weights[p] for p in kept]
    if not kept:
        return {"n": 0, "empty": len(rows)}
    pictures: dict[str, Sequence[Floats]] = {
        name: [
            ciou.upsample(m[p, own.bin_P[p]].reshape(truth.grid_HW), align_corners=False)
            for p in kept
        ]
        for name, m in shapes.items()
    }
    pictures["center"] = [ciou.centre_map()] * len(kept)
    result: Metrics = {name: ciou.ciou_summary(p, truths) for name, p in pictures.items()}
    whole = [ciou.ciou(np.ones(g.shape, dtype=bool), g) for g in truths]
    result["whole_image"] = {"mean": float(np.mean(whole)), "at_0.5": ciou.success_rate(whole)}
    return result | {"n": len(kept), "empty": len(rows) - len(kept)}


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _bounds(pair: tuple[float, float]) -> list[float] | None:
    return None if np.isnan(pair[0]) else list(pair)


# --- correspondence and masked prediction


def correspondence(rows: Rows, encoded: Encoded, protocol: Protocol) -> Metrics | None:
    """Does the match task tell a clip's own audio from another clip's? Chance is 0.5.

    Returns:
        accuracy over both questions (threshold 0), recall of each, area under the ROC curve; None
        if the method has no match task.
    """
    from sklearn.metrics import roc_auc_score

    if encoded.own_N is None or encoded.other_N is None:
        return None
    kept = ~np.isnan(encoded.own_N)
    own, other = encoded.own_N[kept], encoded.other_N[kept]
    if len(own) == 0:
        return {"accuracy": None, "n": 0}
    right = ((own > 0).astype(float) + (other <= 0)) / 2
    truth = np.concatenate([np.ones(len(own)), np.zeros(len(other))])
    result: Metrics = {
        "accuracy": float(right.mean()),
        "accepts_own": float((own > 0).mean()),
        "rejects_other": float((other <= 0).mean()),
        "auc": float(roc_auc_score(truth, np.concatenate([own, other]))),
        "chance": 0.5,
        "n": len(own),
    }
    if protocol.resamples:
        sources = np.asarray(rows.sources)[kept]
        bounds = interval(right, sources, "mean", protocol.resamples, protocol.seed)
        result["ci"] = {"accuracy": list(bounds)}
    return result


def masked(encoded: Encoded, modality_of: Mapping[str, str]) -> dict[str, Metrics]:
    """Masked prediction beside its trivial baseline.

    Patches: mean squared `error` at hidden places, `baseline` of predicting the mean patch of the
    test set, and their `ratio`. Ids: `accuracy`, `baseline` of always naming the most frequent
    hidden id, and their `ratio`.

    Args:
        encoded: with the summed statistics by task.
        modality_of: modality of each masked task; the result is keyed by it, or by the task's
            name where several tasks share a modality.
    """
    names = {task: modality_of.get(task, task) for task in encoded.masked}
    alone = {task for task, name in names.items() if list(names.values()).count(name) == 1}
    return {
        (names[task] if task in alone else task): {"task": task, **_masked_one(sums)}
        for task, sums in sorted(encoded.masked.items())
    }


def _masked_one(sums: dict[str, Floats]) -> Metrics:
    """Accuracy or error of a target's sums (`Target.stats`), and the ratio to its baseline."""
    count = float(np.sum(sums["count"]))
    if count == 0:
        return {"ratio": None, "n": 0}
    name, key = ("accuracy", "correct") if "correct" in sums else ("error", "error_sum")
    value, baseline = float(np.sum(sums[key])) / count, _baseline_sum(sums) / count
    return {name: value, "baseline": baseline, "ratio": value / baseline, "n": count}


def _baseline_sum(sums: dict[str, Floats]) -> float:
    if "baseline_sum" in sums:
        return float(np.sum(sums["baseline_sum"]))
    if "histogram" in sums:  # always the most frequent class
        return float(sums["histogram"].max())
    explained = float((sums["target_sum"] ** 2).sum() / np.sum(sums["cells"]))
    return float(np.sum(sums["square_sum"])) - explained  # always the mean
