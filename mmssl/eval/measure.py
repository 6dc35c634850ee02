"""From collected outputs to numbers: retrieval, correspondence, masked prediction.

Letters in shapes: N rows of the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.eval.bootstrap import interval
from mmssl.eval.embed import Encoded, Rows
from mmssl.eval.items import Metrics, Protocol
from mmssl.eval.retrieval import Items, direction
from mmssl.eval.tables import ranked

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Legs = list[tuple[str, str, str]]
Sides = tuple[NDArray[Any], NDArray[Any] | None]  # vectors of both, or all scores and None

ORDER = ("audio", "video", "text")
_MISSING_SHOWN = 20


# --- retrieval


def retrieval(
    rows: Rows, encoded: Encoded, space_for: Callable[[str, str], str | None], protocol: Protocol
) -> Metrics:
    """All directions between modalities that are compared, on the rows with one object.

    They share a space, named in `space`. Where none relates them but a map score does, clips are
    ranked by its table, and `space` is "map". A text and a whole clip are compared by the mean of
    two cosines, with its sound and with its pictures, each in the space of the pair
    (`text->audio+video`). Rows whose `kind` is "two" are left out: their pictures hold two right
    answers.
    """
    return {
        name: _one_direction(rows, name, kept, sides, protocol) | {"space": space}
        for name, space, kept, sides in compared(rows, encoded, space_for)
    }


def compared(
    rows: Rows, encoded: Encoded, space_for: Callable[[str, str], str | None]
) -> Iterator[tuple[str, str, Ints, Sides]]:
    """Name of every direction, its space, the rows that have both sides, and these of the rows.

    Vectors of several legs stand side by side, all as long as one.
    """
    for name, legs in legs_of(encoded, space_for).items():
        there = candidates(rows)
        for query, base, space in legs:
            there &= encoded.present[query, space] & encoded.present[base, space]
        kept = np.flatnonzero(there)
        sides = [
            np.concatenate([encoded.vectors[leg[side], leg[2]][kept] for leg in legs], axis=1)
            for side in (0, 1)
        ]
        yield name, " + ".join(space for _, _, space in legs), kept, (sides[0], sides[1])
    for (video, other), table in encoded.tables.items():
        yield f"{other}->{video}", "map", table.rows_P, (table.scores_PP.T, None)
        yield f"{video}->{other}", "map", table.rows_P, (table.scores_PP, None)


def legs_of(encoded: Encoded, space_for: Callable[[str, str], str | None]) -> dict[str, Legs]:
    """What is compared in every direction: (query, base, space), two for whole clips."""
    names = {modality for modality, _ in encoded.vectors}
    ordered = [m for m in ORDER if m in names] + sorted(names - set(ORDER))
    spaces = {(q, b): space_for(q, b) for q, b in permutations(ordered, 2)}
    legs = {f"{q}->{b}": [(q, b, space)] for (q, b), space in spaces.items() if space is not None}
    if {"text->audio", "text->video"} <= set(legs):
        legs["text->audio+video"] = legs["text->audio"] + legs["text->video"]
        legs["audio+video->text"] = [(b, q, s) for q, b, s in legs["text->audio+video"]]
    return legs


def candidates(rows: Rows) -> Bools:
    """(N,) rows that take part in retrieval."""
    return np.asarray([ranked(meta) for meta in rows.meta], dtype=bool)


def _one_direction(rows: Rows, name: str, kept: Ints, sides: Sides, protocol: Protocol) -> Metrics:
    missing = [rows.keys[i] for i in np.setdiff1d(np.flatnonzero(candidates(rows)), kept)]
    absent = {"missing": missing[:_MISSING_SHOWN], "n_missing": len(missing)}
    if len(kept) == 0:
        return {"n": 0, **absent}
    items = _items(rows, kept, with_text="text" in name)
    record = None
    if protocol.items is not None:
        record = protocol.items.recorder(f"retrieval.{name}", rows, kept)
    options = (protocol.resamples, protocol.seed, record, protocol.dual_softmax)
    return direction(sides[0], sides[1], items, *options) | absent


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
