"""Labels and predefined folds of clips, scores by fold, and what needs no model.

Letters in shapes: N clips, K classes, P test clips of a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.eval.bootstrap import interval
from mmssl.eval.items import Metrics, Protocol
from mmssl.eval.parts import no_field
from mmssl.types import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_SPLITS = {"train": "train", "val": "dev", "valid": "dev", "validation": "dev", "dev": "dev"}
_SPLITS |= {"test": "test"}


@dataclass(frozen=True)
class Labels:
    """Classes of N clips: table_NK says which; `multi` where a clip may have several or none."""

    names: list[str]
    table_NK: Bools
    multi: bool

    @property
    def ids_N(self) -> Ints:
        """Class of each clip of a single-label set."""
        return np.asarray(self.table_NK.argmax(axis=1))


@dataclass(frozen=True)
class Fold:
    """Rows of one fold: settings are chosen on `dev`, numbers are those of `test`."""

    name: str
    train: Ints
    dev: Ints
    test: Ints

    @property
    def rest(self) -> Ints:
        """All but the test."""
        return np.sort(np.concatenate([self.train, self.dev]))


def read_labels(metas: Sequence[Mapping[str, Any]], field: str) -> tuple[Labels, Ints]:
    """Labels from a field of the clips' meta, and the rows that have it.

    A list is a clip's set of labels, anything else its one label.

    Raises:
        UserError: no clip has the field, or there is one class only.
    """
    kept = [i for i, meta in enumerate(metas) if meta.get(field) is not None]
    if not kept:
        raise no_field("label", field, metas)
    values = [metas[i][field] for i in kept]
    multi = any(isinstance(value, list) for value in values)
    sets = [{str(v) for v in (value if isinstance(value, list) else [value])} for value in values]
    names = sorted(set().union(*sets))
    if len(names) < 2:
        raise UserError(
            f"label={field}: all {len(kept)} clips are of one class, {', '.join(names)}; name a "
            "field that tells clips apart"
        )
    table_NK = np.asarray([[name in labels for name in names] for labels in sets])
    return Labels(names, table_NK, multi), np.asarray(kept)


def read_folds(metas: Sequence[Mapping[str, Any]], field: str) -> list[Fold]:
    """Folds as a field of the clips' meta tells them; they are never split anew.

    Test fold i, settings chosen on fold i + 1 (the first one behind the last), training on the
    others, as HEAR does. The values train, val (valid, validation, dev) and test make one fold.

    Raises:
        UserError: a clip without the field, fewer than three folds, numbered folds with a gap, or
            names of splits beside others.
    """
    values = [str(meta[field]) for meta in metas if meta.get(field) is not None]
    if not values:
        raise no_field("fold", field, metas)
    if len(values) < len(metas):
        raise UserError(
            f"fold={field}: {len(metas) - len(values)} of {len(metas)} labelled clips do not have "
            "that field; give every clip its fold"
        )
    column = np.asarray(values)
    names = _ordered(sorted(set(values)), field)
    unknown = [name for name in names if name not in _SPLITS]
    known = [name for name in names if name in _SPLITS]
    if known and unknown:
        raise UserError(
            f"fold={field}: {', '.join(unknown)} beside {', '.join(known)}; "
            f"name splits {', '.join(_SPLITS)}, or number all folds"
        )
    if not unknown:
        by = [np.flatnonzero([_SPLITS[v] == p for v in values]) for p in ("train", "dev", "test")]
        _check_filled(field, dict(zip(("train", "val", "test"), by, strict=True)))
        return [Fold("test", *by)]
    if len(names) < 3:
        raise UserError(
            f"fold={field}: only the folds {', '.join(names)}; three are needed, for training, "
            "choosing and testing"
        )
    rows = [np.flatnonzero(column == name) for name in names]
    found = []
    for i, name in enumerate(names):
        j = (i + 1) % len(names)
        train = [part for k, part in enumerate(rows) if k not in (i, j)]
        found.append(Fold(name, np.sort(np.concatenate(train)), rows[j], rows[i]))
    return found


def _ordered(names: list[str], field: str) -> list[str]:
    """By number where all are numbers, which then must not leave one out."""
    if not all(name.isdecimal() for name in names):
        return names
    numbers = sorted(int(name) for name in names)
    gaps = set(range(numbers[0], numbers[-1] + 1)) - set(numbers)
    if gaps:
        raise UserError(
            f"fold={field}: fold {min(gaps)} has no labelled clip, but folds {numbers[0]} to "
            f"{numbers[-1]} exist; add its clips, or number the folds without a gap"
        )
    return sorted(names, key=int)


def _check_filled(field: str, parts: Mapping[str, Ints]) -> None:
    for name, rows in parts.items():
        if len(rows) == 0:
            raise UserError(f"fold={field}: no clip of `{name}`; add some")


def shared_sources(folds: Sequence[Fold], sources_N: NDArray[np.generic]) -> int:
    """Sources with clips in several folds: their clips leak from training into a test."""
    owners: dict[Any, set[str]] = {}
    for fold in folds:
        for source in set(sources_N[fold.test].tolist()):
            owners.setdefault(source, set()).add(fold.name)
        for source in set(sources_N[fold.rest].tolist()) if len(folds) == 1 else ():
            owners.setdefault(source, set()).add("rest")
    return sum(len(names) > 1 for names in owners.values())


# --- scores


def score(scores_NK: Floats, labels: Labels, rows: Ints) -> Metrics:
    """Numbers of some rows: accuracy, or of several labels macro mAP, AUC and d'.

    d' = sqrt(2) times the normal quantile of the macro AUC. Classes that all or none of the rows
    have are left out of the macro means, `classes` are counted.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not labels.multi:
        right = scores_NK[rows].argmax(axis=1) == labels.ids_N[rows]
        return {"accuracy": float(right.mean()), "n": len(rows)}
    truth_NK, guess_NK = labels.table_NK[rows], scores_NK[rows]
    known = np.flatnonzero(truth_NK.any(axis=0) & ~truth_NK.all(axis=0))
    if len(known) == 0:
        raise UserError("a part of the clips has no class that only some of its clips have")
    map_ = average_precision_score(truth_NK[:, known], guess_NK[:, known], average="macro")
    auc = float(roc_auc_score(truth_NK[:, known], guess_NK[:, known], average="macro"))
    return {
        "map": float(map_),
        "auc": auc,
        "d_prime": 2**0.5 * NormalDist().inv_cdf(min(max(auc, 1e-12), 1 - 1e-12)),
        "classes": len(known),
        "n": len(rows),
    }


def headline(labels: Labels) -> str:
    """The metric that counts."""
    return "map" if labels.multi else "accuracy"


def summary(
    scores_NK: Floats,
    labels: Labels,
    folds: Sequence[Fold],
    sources_N: NDArray[np.generic],
    protocol: Protocol,
    record: Callable[[str, Any], None] | None = None,
) -> Metrics:
    """Mean and standard deviation over folds of scores that were made fold by fold.

    `mean` and `std` (over folds, n - 1) are those of the headline metric. Single labels also get a
    95 % interval over sources, and `record` the hit of every clip (rows outside all tests: none);
    macro means of several labels are no means over clips, so that nothing is recorded.
    """
    name = headline(labels)
    parts = {fold.name: score(scores_NK, labels, fold.test) for fold in folds}
    values = [part[name] for part in parts.values()]
    result: Metrics = {
        "metric": name,
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "folds": parts,
        "n": sum(part["n"] for part in parts.values()),
    }
    if labels.multi:
        return result
    tested = np.sort(np.concatenate([fold.test for fold in folds]))
    hits = (scores_NK[tested].argmax(axis=1) == labels.ids_N[tested]).astype(float)
    if protocol.resamples:
        bounds = interval(hits, sources_N[tested], "mean", protocol.resamples, protocol.seed)
        result["ci"] = {"mean": list(bounds)}
    if record is not None:
        record("hit", hits)
    return result


def majority(labels: Labels, folds: Sequence[Fold]) -> Floats:
    """(N, K) scores that know nothing of a clip: the share of each class outside its fold.

    Where the test part lies among the rest (neighbours without folds): among the other clips.
    """
    scores_NK = np.full(labels.table_NK.shape, np.nan)
    for fold in folds:
        own_P1 = np.isin(fold.test, fold.rest)[:, None]
        count_PK = labels.table_NK[fold.rest].sum(axis=0) - own_P1 * labels.table_NK[fold.test]
        scores_NK[fold.test] = count_PK / (len(fold.rest) - own_P1)
    return scores_NK
