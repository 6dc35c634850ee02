"""`mmssl eval probe RUN label=FIELD fold=FIELD`: a linear probe of frozen features.

Letters in shapes: N clips, P clips of a test, D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.eval import folds as folding
from mmssl.eval.features import SIGNAL, Features, FeatureSpec, clip_features
from mmssl.eval.folds import Fold, Labels
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, interval_of, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, progress
from mmssl.types import UserError

Floats = NDArray[np.float64]

GRID = tuple(10.0**k for k in range(-4, 5))  # inverse strengths of the L2 penalty
_WIDE = 4  # features per row; with fewer the rotation costs more than it saves
_RANK = 1e-10  # of the largest square; axes of less are rounding


class Options(FeatureSpec):
    """What can be set behind `mmssl eval probe RUN`."""

    label: str = ""  # field of the clips' meta: the class, or a list of classes
    fold: str = ""  # field of the clips' meta that names the predefined fold


class Classifier(Protocol):
    """Makes (N, K) scores of each fold's test clips from features (N, D); see `linear`."""

    def __call__(
        self, x_ND: ArrayLike, labels: Labels, folds: Sequence[Fold], title: str
    ) -> tuple[Floats, Metrics]:
        """Scores and what was chosen by fold."""
        ...


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: no such field, one class only, folds that cannot be used, no such modality.
    """

    def classify(
        x_ND: ArrayLike, labels: Labels, folds: Sequence[Fold], title: str
    ) -> tuple[Floats, Metrics]:
        scores_NK, chosen = linear(x_ND, labels, folds, title=title)
        return scores_NK, {"c": chosen}

    options = cast("Options", session.options)
    session.check_fields(label=options.label, fold=options.fold)
    features = clip_features(session)
    labels, kept = folding.read_labels(features.rows.meta, options.label)
    folds = folding.read_folds([features.rows.meta[i] for i in kept], options.fold)
    found = session.facts("probe", features.rows.meta)
    found |= by_source(session, "probe", features, labels, kept, folds, classify)
    found["plots"] = [fold_plot("Linear probe", found, "probe", folds)]
    return found


def by_source(
    session: Session,
    suite: str,
    features: Features,
    labels: Labels,
    kept: NDArray[np.int64],
    folds: Sequence[Fold],
    classify: Classifier,
) -> Results:
    """The same numbers of the trained model, random weights, signal and majority class."""
    sources = np.asarray(features.rows.sources)[kept]
    tested = np.sort(np.concatenate([fold.test for fold in folds]))
    record = session.items.recorder(suite, features.rows, kept[tested])
    protocol, made = session.protocol, {}
    for name, x_ND in features.values.items():
        scores_NK, chosen = classify(x_ND[kept], labels, folds, name)
        own = record if name == TRAINED else None
        made[name] = folding.summary(scores_NK, labels, folds, sources, protocol, own) | chosen
    guess = folding.majority(labels, folds)
    trivial = {"majority": folding.summary(guess, labels, folds, sources, protocol)}
    trivial[SIGNAL] = made[SIGNAL]
    facts = {
        "classes": len(labels.names),
        "unlabelled": len(features.rows.keys) - len(kept),
        "n_missing": len(features.absent),
        "shared_sources": folding.shared_sources(folds, sources),
    }
    found: Results = {suite: made[TRAINED] | facts, "trivial": {suite: trivial}}
    if RANDOM in made:
        found["random_encoder"] = {suite: made[RANDOM]}
    return found


def fold_plot(title: str, found: Results, suite: str, folds: Sequence[Fold]) -> Results:
    """The headline metric by fold, and its mean, of model and baselines."""
    parts: Mapping[str, Any] = {
        "trained": found[suite],
        "random weights": (found.get("random_encoder") or {}).get(suite),
        **found["trivial"][suite],
    }
    metric = found[suite]["metric"]
    lines = {
        name: [part["mean"], *(part["folds"][fold.name][metric] for fold in folds)]
        for name, part in parts.items()
        if part
    }
    bounds = {
        name: [interval_of(part, "mean"), *(None for _ in folds)]
        for name, part in parts.items()
        if part
    }
    spread = found[suite]["std"]
    more = "" if spread is None else f", standard deviation over folds {spread:.3f}"
    return plot(
        f"{title}: {metric}{more}", "fold", ["mean", *(f.name for f in folds)], lines, bounds
    )


# --- the probe


def linear(
    x_ND: ArrayLike,
    labels: Labels,
    folds: Sequence[Fold],
    grid: Sequence[float] = GRID,
    title: str = "probe",
) -> tuple[Floats, dict[str, float]]:
    """(N, K) scores of every test clip by logistic regression, and the C of each fold.

    Features are standardised with the statistics of what is fitted on. C is chosen on the fold's
    `dev` part (the smaller one on a tie), then all but the test is fitted again. Several labels:
    one against the rest. Of far more features than rows only the rows' span is fitted, as the
    penalised optimum lies in it.

    Raises:
        UserError: the training clips of a fold all have the same labels.
    """
    x = np.asarray(x_ND, dtype=np.float64)
    scores_NK = np.full(labels.table_NK.shape, np.nan)
    chosen = {}
    for fold in progress(folds, f"probe, {title}", len(folds)):
        _check_classes(labels, fold.train, fold.name)
        chosen[fold.name] = c = _strength(x, labels, fold, grid)
        found = regressions(x, labels, fold.rest, fold.test, (c,), fold.name)
        scores_NK[fold.test] = next(found)
    return scores_NK, chosen


def regressions(
    x_ND: Floats,
    labels: Labels,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    grid: Sequence[float],
    name: str,
) -> Iterator[Floats]:
    """(P, K) scores of the rows `test` for each C of the grid, fitted on the rows `train`.

    Raises:
        UserError: the rows `train` all have the same labels; `name` tells where.
    """
    _check_classes(labels, train, name)
    parts = _standardised(x_ND, train, test)
    for c in grid:
        yield _fit(*parts, labels, train, c)


def _strength(x_ND: Floats, labels: Labels, fold: Fold, grid: Sequence[float]) -> float:
    """The C of the grid that is best on `dev`, the smaller one on a tie."""
    if len(grid) == 1:
        return grid[0]
    best, chosen = -np.inf, grid[0]
    found = regressions(x_ND, labels, fold.train, fold.dev, grid, fold.name)
    for c, guess_PK in zip(grid, found, strict=True):
        guess_NK = np.full(labels.table_NK.shape, np.nan)
        guess_NK[fold.dev] = guess_PK
        value = folding.score(guess_NK, labels, fold.dev)[folding.headline(labels)]
        if value > best:
            best, chosen = value, c
    return chosen


def _check_classes(labels: Labels, rows: NDArray[np.int64], name: str) -> None:
    if not _varying(labels, rows).any():
        raise UserError(
            f"fold {name}: its {len(rows)} training clips do not differ in their labels; "
            "folds must mix the classes"
        )


def _varying(labels: Labels, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(K,) classes that some of the rows have and some have not."""
    table_NK = labels.table_NK[rows]
    return np.asarray(table_NK.any(axis=0) & ~table_NK.all(axis=0))


def _standardised(
    x_ND: Floats, train: NDArray[np.int64], test: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Features of both parts by the statistics of `train`; in its rows' span if they are wide."""
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler()
    known_RD, asked_PD = scale.fit_transform(x_ND[train]), scale.transform(x_ND[test])
    if x_ND.shape[1] <= _WIDE * len(train) or not known_RD.any():
        return known_RD, asked_PD
    # principal axes by the rows' products, of which there are fewer than of the features
    square_E, axes_RE = np.linalg.eigh(known_RD @ known_RD.T)
    there_E = square_E > _RANK * square_E[-1]
    length_E, axes_RE = np.sqrt(square_E[there_E]), axes_RE[:, there_E]
    return axes_RE * length_E, (asked_PD @ known_RD.T) @ (axes_RE / length_E)


def _fit(
    x_ND: Floats, test_PD: Floats, labels: Labels, train: NDArray[np.int64], c: float
) -> Floats:
    """(P, K) scores of the rows of `test_PD` by a regression fitted on x_ND, the rows `train`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model = LogisticRegression(C=c, max_iter=500)
    scores_PK = np.zeros((len(test_PD), len(labels.names)))
    with warnings.catch_warnings():
        # weak penalties of separable classes never settle, their predictions do
        warnings.simplefilter("ignore", ConvergenceWarning)
        if labels.multi:
            there = _varying(labels, train)
            several = OneVsRestClassifier(model)
            several.fit(x_ND, labels.table_NK[train][:, there].astype(int))
            # of a single class there are two columns, without and with it
            scores_PK[:, there] = several.predict_proba(test_PD)[:, -there.sum() :]
            scores_PK[:, labels.table_NK[train].all(axis=0)] = 1.0
            return scores_PK
        model.fit(x_ND, labels.ids_N[train])
        scores_PK[:, model.classes_] = model.predict_proba(test_PD)
    return scores_PK
