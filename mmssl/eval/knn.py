"""`mmssl eval knn RUN label=FIELD [fold=FIELD]`: nearest neighbours by cosine.

Letters in shapes: N clips, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.eval import folds as folding
from mmssl.eval.features import SIGNAL, clip_features
from mmssl.eval.folds import Fold, Labels
from mmssl.eval.items import Metrics
from mmssl.eval.probe import Options
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.retrieval import normalize
from mmssl.eval.session import RANDOM, TRAINED, Session, progress
from mmssl.types import UserError

Floats = NDArray[np.float64]

KS = (1, 5, 10, 20, 200)
TEMPERATURE = 0.07  # of the weights exp(cosine / T) (Caron et al. 2021, DINO)
_BLOCK = 256  # queries at a time

__all__ = ["Options", "evaluate", "neighbours"]


def evaluate(session: Session) -> Results:
    """Results of the suite; without `fold`, every clip is asked against all of other sources.

    Raises:
        UserError: no such field, one class only, folds that cannot be used, no such modality.
    """
    options = cast("Options", session.options)
    session.check_fields(label=options.label, **({"fold": options.fold} if options.fold else {}))
    features = clip_features(session)
    labels, kept = folding.read_labels(features.rows.meta, options.label)
    metas = [features.rows.meta[i] for i in kept]
    everyone = np.arange(len(kept))
    folds = [Fold("all", everyone, everyone[:0], everyone)]
    if options.fold:
        folds = folding.read_folds(metas, options.fold)
    sources = np.asarray(features.rows.sources)[kept]
    tested = np.sort(np.concatenate([fold.test for fold in folds]))
    made: dict[str, Metrics] = {}
    for name, x_ND in features.values.items():
        made[name] = {}
        for key, scores_NK in neighbours(x_ND[kept], labels, folds, sources, title=name).items():
            record = None
            if name == TRAINED:
                record = session.items.recorder(f"knn.{key}", features.rows, kept[tested])
            made[name][key] = folding.summary(
                scores_NK, labels, folds, sources, session.protocol, record
            )
    guess = folding.majority(labels, folds)
    majority = folding.summary(guess, labels, folds, sources, session.protocol)
    found = session.facts("knn", features.rows.meta)
    found["knn"] = made[TRAINED] | {"n": len(kept), "n_missing": len(features.absent)}
    found["trivial"] = {"knn": {"majority": majority, SIGNAL: made[SIGNAL]}}
    if RANDOM in made:
        found["random_encoder"] = {"knn": made[RANDOM]}
    found["plots"] = [_plot(made, majority["mean"], folding.headline(labels))]
    return found


def _plot(made: dict[str, Metrics], majority: float, metric: str) -> dict[str, Any]:
    ks = [key.removeprefix("k") for key in made[TRAINED] if not key.endswith("_weighted")]
    lines, bounds = {}, {}
    for name, part in made.items():
        for tail, title in (("", ""), ("_weighted", ", weighted")):
            rows = [part[f"k{k}{tail}"] for k in ks]
            lines[f"{name}{title}"] = [row["mean"] for row in rows]
            bounds[f"{name}{title}"] = [interval_of(row, "mean") for row in rows]
    lines["majority"] = [majority] * len(ks)
    return plot(f"Nearest neighbours: {metric}", "k", ks, lines, bounds)


def neighbours(
    x_ND: ArrayLike,
    labels: Labels,
    folds: Sequence[Fold],
    sources_N: NDArray[np.generic],
    ks: Sequence[int] = KS,
    title: str = "knn",
) -> dict[str, Floats]:
    """(N, K) votes by `k5`, `k5_weighted` ...: each of the k nearest counts 1, or exp(s / 0.07).

    The gallery of a test clip is all outside its fold and of another source. A k beyond the
    smallest gallery is left out; equal similarities count in the order of the gallery.

    Raises:
        UserError: a clip has an empty gallery.
    """
    x, table = normalize(x_ND), labels.table_NK.astype(np.float64)
    blocks = [(f, f.test[b : b + _BLOCK]) for f in folds for b in range(0, len(f.test), _BLOCK)]
    smallest = min(_gallery_sizes(folds, sources_N))
    if smallest == 0:
        raise UserError("knn: a clip has no clip of another source to be compared with")
    kept = [k for k in ks if k <= smallest]
    votes = {
        f"k{k}{tail}": np.full(table.shape, np.nan) for k in kept for tail in ("", "_weighted")
    }
    for fold, asked in progress(blocks, f"knn, {title}", len(blocks)):
        cosines = x[asked] @ x[fold.rest].T
        cosines[sources_N[asked][:, None] == sources_N[fold.rest][None]] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")[:, : max(kept)]
        nearest = table[fold.rest][order]
        weights = np.exp(np.take_along_axis(cosines, order, axis=1) / TEMPERATURE)
        for k in kept:
            votes[f"k{k}"][asked] = nearest[:, :k].sum(axis=1)
            weighted = (nearest[:, :k] * weights[:, :k, None]).sum(axis=1)
            votes[f"k{k}_weighted"][asked] = weighted
    return votes


def _gallery_sizes(folds: Sequence[Fold], sources_N: NDArray[np.generic]) -> list[int]:
    sizes = []
    for fold in folds:
        names, counts = np.unique(sources_N[fold.rest], return_counts=True)
        own = dict(zip(names.tolist(), counts.tolist(), strict=True))
        sizes += [len(fold.rest) - own.get(s, 0) for s in sources_N[fold.test].tolist()]
    return sizes
