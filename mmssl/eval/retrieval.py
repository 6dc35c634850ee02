"""Retrieval metrics on embedding matrices, with ties counted against the encoder.

Where a score is no product of two vectors, the table of all scores stands for the queries'
embeddings and None for those of the database.

Letters in shapes: Q queries, N items of the database, D width, C queries of a chunk.

Ties are resolved pessimistically: everything that scores as high as the best relevant item stands
before it. An encoder that maps everything to one point therefore scores 0, not 100 %. The expected
rank under random tie-breaking is stored beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmssl.eval.bootstrap import interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Metrics = dict[str, Any]

CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """Per query: where the first relevant item stands (1 = top).

    pessimistic_Q: rank with ties counted before the target. expected_Q: mean rank if ties were
    shuffled. relevant_Q, pool_Q: relevant items and all items that the query is compared with.
    Ties pessimistic, too: precision_Q: average precision; precision_10_Q: over the first ten, its
    denominator min(relevant, 10); gain_Q: nDCG of the first ten; recall_QK: share of the relevant
    items among the first k of `CUTS`.
    """

    pessimistic_Q: Ints
    expected_Q: Floats
    relevant_Q: Ints
    pool_Q: Ints
    precision_Q: Floats
    precision_10_Q: Floats
    gain_Q: Floats
    recall_QK: Floats

    def hits(self, k: int) -> Bools:
        """(Q,) a relevant item is among the first k."""
        return self.pessimistic_Q <= k


@dataclass(frozen=True)
class Items:
    """What is known about the N items that both modalities describe (row i of both is one clip).

    sources_N: items of one source are drawn together by the bootstrap. classes_N: right answer of
    `class_at_1`. texts_N: id of the caption, 0 where missing; equal ids share a label. groups_N:
    items that only timing can tell apart (same class and size).
    """

    sources_N: NDArray[np.generic]
    classes_N: NDArray[np.generic] | None = None
    texts_N: Ints | None = None
    groups_N: NDArray[np.generic] | None = None


def normalize(x_ND: ArrayLike) -> Floats:
    """Unit rows in float64; a row of zeros stays zero."""
    x = np.asarray(x_ND, dtype=np.float64)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def ranks(
    query_QD: ArrayLike,
    base_ND: ArrayLike | None,
    query_labels_Q: ArrayLike,
    base_labels_N: ArrayLike,
    query_groups_Q: ArrayLike | None = None,
    base_groups_N: ArrayLike | None = None,
    chunk: int = 1024,
    dual_softmax: float = 0.0,
) -> Ranks:
    """Rank the database for every query; an item is relevant where the labels are equal.

    Args:
        query_QD: embeddings of the queries, or the scores (Q, N).
        base_ND: embeddings of the database; None: `query_QD` holds the scores.
        query_labels_Q: labels of the queries.
        base_labels_N: labels of the database.
        query_groups_Q: with `base_groups_N`: each query meets the items of its own group only.
        base_groups_N: groups of the database.
        chunk: queries per block of similarities.
        dual_softmax: scale of a re-weighting that needs all queries at once (after Cheng et al.
            2021, CAMoE): softmax over the items times softmax over the queries, both of the
            scaled scores, which what is added to all scores does not change; 0 = none.

    Raises:
        ValueError: a query has no relevant item, or embeddings or scores are not finite.
    """
    columns = (np.asarray(query_labels_Q), np.asarray(base_labels_N))
    groups = None
    if query_groups_Q is not None and base_groups_N is not None:
        groups = (np.asarray(query_groups_Q), np.asarray(base_groups_N))
    parts = []
    for rows, scores_CN in _chunks(query_QD, base_ND, chunk, dual_softmax):
        pool_CN = np.ones(scores_CN.shape, bool) if groups is None else _equal(groups, rows)
        parts.append(_rank_chunk(scores_CN, _equal(columns, rows) & pool_CN, pool_CN))
    return Ranks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _equal(columns: tuple[NDArray[np.generic], NDArray[np.generic]], rows: slice) -> Bools:
    return np.asarray(columns[0][rows, None] == columns[1][None])


def top(query_QD: ArrayLike, base_ND: ArrayLike | None, k: int) -> Ints:
    """(Q, k) items with the highest scores, best first; equal scores in database order."""
    parts = [
        np.argsort(-scores, axis=1, kind="stable")[:, :k]
        for _, scores in _chunks(query_QD, base_ND)
    ]
    return np.concatenate(parts)


def _chunks(
    query_QD: ArrayLike, base_ND: ArrayLike | None, chunk: int = 1024, dual_softmax: float = 0.0
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    base = None if base_ND is None else normalize(base_ND)
    query = np.asarray(query_QD) if base is None else normalize(query_QD)
    if not (np.isfinite(query).all() and (base is None or np.isfinite(base).all())):
        what = "scores" if base is None else "embeddings"
        raise ValueError(f"{what} hold values that are not finite")

    def scores(rows: slice) -> Floats:
        return query[rows].astype(np.float64) if base is None else query[rows] @ base.T

    # Products are summed in float64 and rounded to float32, so that scores that are equal in exact
    # arithmetic stay equal whatever the order of the items.
    blocks = [slice(begin, begin + chunk) for begin in range(0, len(query), chunk)]
    if not dual_softmax:
        for rows in blocks:
            yield rows, scores(rows).astype(np.float32)
        return
    totals = [np.logaddexp.reduce(dual_softmax * scores(rows), axis=0) for rows in blocks]
    total_N = np.logaddexp.reduce(totals, axis=0)
    for rows in blocks:
        # the sum of both logarithms, less what is the same for all items of a query
        weight_CN = 2 * dual_softmax * scores(rows) - total_N
        # 1 below zero, near which float32 would tell apart what float64 has rounded differently
        below_CN = weight_CN - weight_CN.max(axis=1, keepdims=True) - 1
        yield rows, below_CN.astype(np.float32)


def _rank_chunk(
    scores_CN: NDArray[np.float32], relevant_CN: Bools, pool_CN: Bools
) -> tuple[NDArray[Any], ...]:
    """The fields of `Ranks` for some queries."""
    if not relevant_CN.any(axis=1).all():
        raise ValueError("a query has no relevant item in the database")
    best_C1 = np.where(relevant_CN, scores_CN, -np.inf).max(axis=1, keepdims=True)
    other_CN = pool_CN & ~relevant_CN
    above_C = (other_CN & (scores_CN > best_C1)).sum(axis=1)
    tied_C = (other_CN & (scores_CN == best_C1)).sum(axis=1)
    partners_C = (relevant_CN & (scores_CN == best_C1)).sum(axis=1)
    # of k others and m relevant items in random order, k / (m + 1) others come first
    expected_C = 1 + above_C + tied_C / (partners_C + 1)
    sizes = (relevant_CN.sum(axis=1), pool_CN.sum(axis=1))
    found = _of_all_relevant(scores_CN, relevant_CN, pool_CN)
    return 1 + above_C + tied_C, expected_C, *sizes, *found


def _of_all_relevant(
    scores_CN: NDArray[np.float32], relevant_CN: Bools, pool_CN: Bools
) -> tuple[Floats, ...]:
    """Average precision, the same of the first ten, nDCG of the first ten, recalls (C, K)."""
    ordered = np.where(pool_CN, -scores_CN, np.inf)
    order = np.lexsort((relevant_CN, ordered), axis=-1)
    hits_CN = np.take_along_axis(relevant_CN, order, axis=1)
    places_N = np.arange(1, hits_CN.shape[1] + 1)
    reached_CN = np.cumsum(hits_CN, axis=1)
    precision_CN = reached_CN / places_N * hits_CN
    total_C = hits_CN.sum(axis=1)
    discount_N = np.where(places_N <= 10, 1 / np.log2(places_N + 1), 0.0)
    ideal_C = np.cumsum(discount_N)[total_C - 1]
    last = [min(k, hits_CN.shape[1]) - 1 for k in CUTS]
    return (
        precision_CN.sum(axis=1) / total_C,
        precision_CN[:, :10].sum(axis=1) / np.minimum(total_C, 10),
        (hits_CN * discount_N).sum(axis=1) / ideal_C,
        reached_CN[:, last] / total_C[:, None],
    )


def direction(
    query_ND: ArrayLike,
    base_ND: ArrayLike | None,
    items: Items,
    resamples: int = 1000,
    seed: int = 0,
    record: Callable[[str, ArrayLike], None] | None = None,
    dual_softmax: float = 0.0,
) -> Metrics:
    """All metrics of one direction; row i of queries and database describe the same clip.

    `r_at_k`, `median_rank`, `mean_rank`, `expected_rank` and `ndcg_at_10` ask for the clip's own
    partner (one relevant item, where MRR = mAP). `class_at_1` and `class_map` accept any item of
    the class, `equal_text` any item with the same caption, `same_group` ranks among the items of
    the same class and size. `dual_softmax`: the own partner with that re-weighting, see `ranks`;
    it is another task and stands beside the other numbers. `chance` holds what random scores would
    reach; `ci` 95 % intervals over the sources. `record` is called with the name and the values
    (N,) of the headline metrics of every query.
    """
    n = len(items.sources_N)
    own = ranks(query_ND, base_ND, np.arange(n), np.arange(n))
    result: Metrics = {**summary(own), "n": n}
    result["chance"] = {f"r_at_{k}": min(k / n, 1.0) for k in CUTS} | {"median_rank": (n + 1) / 2}
    columns = {f"r_at_{k}": own.hits(k) for k in CUTS}
    if items.classes_N is not None:
        same = ranks(query_ND, base_ND, items.classes_N, items.classes_N)
        columns["class_at_1"] = same.hits(1)
        result["class_at_1"] = float(same.hits(1).mean())
        result["class_map"] = float(same.precision_Q.mean())
        result["chance"]["class_at_1"] = float((same.relevant_Q / same.pool_Q).mean())
    if items.texts_N is not None:
        result["equal_text"] = equal_text(query_ND, base_ND, items.texts_N)
    if dual_softmax:
        dual = ranks(query_ND, base_ND, np.arange(n), np.arange(n), dual_softmax=dual_softmax)
        result["dual_softmax"] = {"scale": dual_softmax, **summary(dual)}
    if items.groups_N is not None:
        result["same_group"] = same_group(query_ND, base_ND, items, resamples, seed)
    if resamples:
        result["ci"] = _intervals(columns, own, items, resamples, seed)
    if record is not None:
        for name in ("class_at_1", "r_at_1", "r_at_10"):
            if name in columns:
                record(name, columns[name])
        record("rank", own.pessimistic_Q)
    return result


def summary(own: Ranks) -> Metrics:
    """Hit rates `r_at_k`, median and mean rank of the best relevant item, mAP and nDCG.

    With one relevant item per query mAP is the mean reciprocal rank.
    """
    rank_Q = own.pessimistic_Q
    return {
        **{f"r_at_{k}": float(own.hits(k).mean()) for k in CUTS},
        "median_rank": float(np.median(rank_Q)),
        "mean_rank": float(rank_Q.mean()),
        "expected_rank": float(own.expected_Q.mean()),
        "map": float(own.precision_Q.mean()),
        "map_at_10": float(own.precision_10_Q.mean()),
        "ndcg_at_10": float(own.gain_Q.mean()),
    }


def equal_text(query_ND: ArrayLike, base_ND: ArrayLike | None, texts_N: Ints) -> Metrics:
    """The same where all items with the query's caption count (a missing one equals none).

    `r_at_k` are hit rates (some relevant item among the first k), `recall_at_k` the share of the
    relevant items that is there.
    """
    alone = np.arange(len(texts_N)) + np.asarray(texts_N).max(initial=0) + 1
    labels = np.where(texts_N == 0, alone, texts_N)
    shared = ranks(query_ND, base_ND, labels, labels)
    recalls = zip(CUTS, shared.recall_QK.mean(axis=0), strict=True)
    return {
        **summary(shared),
        **{f"recall_at_{k}": float(value) for k, value in recalls},
        "duplicates": int((shared.relevant_Q > 1).sum()),
    }


def same_group(
    query_ND: ArrayLike,
    base_ND: ArrayLike | None,
    items: Items,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """R@1 among the items of the query's own group; groups of one item are left out.

    `chance` is the mean over the queries of 1 / group size, `times_chance` the ratio.
    """
    groups = np.asarray(items.groups_N)
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(sizes[member] > 1)
    if len(kept) == 0:
        return {"r_at_1": None, "chance": None, "times_chance": None, "n": 0}
    query, base = among(query_ND, base_ND, kept)
    found = ranks(query, base, kept, kept, groups[kept], groups[kept])
    hit, chance = float(found.hits(1).mean()), float((1 / found.pool_Q).mean())
    result: Metrics = {
        "r_at_1": hit,
        "chance": chance,
        "times_chance": hit / chance,
        "n": len(kept),
    }
    if resamples:
        sources = np.asarray(items.sources_N)[kept]
        result["ci"] = {"r_at_1": list(interval(found.hits(1), sources, "mean", resamples, seed))}
    return result


def among(
    query_ND: ArrayLike, base_ND: ArrayLike | None, kept: Ints
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The kept items of both sides."""
    query = np.asarray(query_ND)
    if base_ND is None:
        return query[np.ix_(kept, kept)], None
    return query[kept], np.asarray(base_ND)[kept]


def _intervals(
    columns: dict[str, Bools], own: Ranks, items: Items, resamples: int, seed: int
) -> dict[str, list[float]]:
    bounds = {
        name: list(interval(values, items.sources_N, "mean", resamples, seed))
        for name, values in columns.items()
    }
    median = interval(own.pessimistic_Q, items.sources_N, "median", resamples, seed)
    return bounds | {"median_rank": list(median)}
