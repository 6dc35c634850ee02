"""Yes or no by a threshold that was chosen on other clips; and precision where a place counts, too.

Letters in shapes: N clips.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.eval.items import Metrics

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def halves(sources_N: NDArray[np.generic], seed: int) -> Bools:
    """(N,) True for the clips of a random half of the sources."""
    names, member_N = np.unique(sources_N, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.asarray(order[member_N] < (len(names) + 1) // 2)


def threshold(yes_N: ArrayLike, no_N: ArrayLike) -> float:
    """The score from which on to say yes, by balanced accuracy (the mean of both hit rates).

    Midway between two scores; of equally good ones the lowest; -inf where saying yes is best.
    """
    yes, no = np.sort(np.asarray(yes_N, float)), np.sort(np.asarray(no_N, float))
    scores = np.unique(np.concatenate([yes, no]))
    cuts = np.concatenate([[-np.inf], (scores[:-1] + scores[1:]) / 2, [np.inf]])
    accepted = 1 - np.searchsorted(yes, cuts) / max(1, len(yes))
    rejected = np.searchsorted(no, cuts) / max(1, len(no))
    return float(cuts[int(np.argmax(accepted + rejected))])


def auc(yes_N: ArrayLike, no_N: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a yes scores higher than a no, ties one half."""
    from sklearn.metrics import roc_auc_score

    yes, no = np.asarray(yes_N), np.asarray(no_N)
    truth = np.concatenate([np.ones(len(yes)), np.zeros(len(no))])
    return float(roc_auc_score(truth, np.concatenate([yes, no])))


def crossed(yes_N: Floats, no_N: Floats, first_N: Bools) -> Floats:
    """(N,) share of right answers per clip (its yes and its no), each half by the other's cut."""
    right_N = np.zeros(len(yes_N))
    for part in (first_N, ~first_N):
        cut = threshold(yes_N[~part], no_N[~part])
        right_N[part] = ((yes_N[part] >= cut) + (no_N[part] < cut).astype(float)) / 2
    return right_N


def calibrated(yes_N: Floats, no: Mapping[str, Floats], first_N: Bools) -> Metrics:
    """A threshold chosen on the first half of the clips and tested on the second.

    Args:
        yes_N: scores of clips that deserve a yes.
        no: scores of the same clips changed so that they deserve a no, by kind of change.
        first_N: which clips calibrate.
    """
    cut = threshold(yes_N[first_N], np.concatenate([x[first_N] for x in no.values()]))
    test = ~first_N
    result: Metrics = {
        "threshold": cut if np.isfinite(cut) else None,
        "accepts": float((yes_N[test] >= cut).mean()),
        "n_calibration": int(first_N.sum()),
        "n": int(test.sum()),
    }
    for name, x_N in no.items():
        result[f"rejects_{name}"] = float((x_N[test] < cut).mean())
        result[f"auc_{name}"] = auc(yes_N, x_N)
    rejected = [result[f"rejects_{name}"] for name in no]
    result["balanced_accuracy"] = (result["accepts"] + float(np.mean(rejected))) / 2
    return result


def with_negatives(yes_N: Floats, placed_N: Bools, no_N: Floats) -> Metrics:
    """AP and greatest F1 where a yes counts only at the right place (Mo, Morgado 2022, SLAVC).

    At each threshold: right = confident and well placed; false = confident and badly placed, or
    nothing to be seen; missed = not confident although there is something. `ap` sums interpolated
    precision (the greatest at any higher recall) over recall.
    """
    cuts = np.unique(np.concatenate([yes_N, no_N]))[::-1]
    sure = yes_N[None] >= cuts[:, None]
    right = (sure & placed_N).sum(axis=1)
    false = (sure & ~placed_N).sum(axis=1) + (no_N[None] >= cuts[:, None]).sum(axis=1)
    missed = (~sure).sum(axis=1)
    precision = right / np.maximum(right + false, 1)
    recall = right / np.maximum(right + missed, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    f1 = 2 * right / np.maximum(2 * right + false + missed, 1)
    return {
        "ap": float((np.diff(recall, prepend=0.0) * best).sum()),
        "max_f1": float(f1.max()),
    }
