"""Nearest vectors of a LanceDB table: exact, or by an IVF-PQ index whose recall is measured.

An inverted file (IVF) sends a query to the partitions whose centres are nearest, product codes (PQ;
Jegou, Douze, Schmid 2011) rank what is there, and the best are ranked again by their full vectors.

Letters in shapes: N rows of the table, Q queries, K results, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]

K = 10  # recall is that of the first ten
PROBES = (8, 16, 32, 64, 128, 256)  # tried in this order
REFINE = 20  # codes of so many times K rows are replaced by their vectors
FILTERED = (
    1 / 3
)  # a filter that keeps a share s of the rows takes s ** -FILTERED as many partitions
MIN_ROWS = 4096  # an index of fewer can neither be trained well nor save time
_ROWS_PER_PARTITION = 1024
_DIMS_PER_CODE = 4  # a byte for four numbers
_BLOCK = 8192  # rows that are compared at once
_SAMPLES, _ROUNDS = 128, 20  # of k-means: rows per centre, iterations; more of them help little
_TIE = 1e-5  # cosines nearer than this are equal


@dataclass(frozen=True)
class Approximate:
    """How an index is asked: partitions, and rows per result that are ranked by full vectors."""

    probes: int
    refine: int = REFINE


def train(table: Any, column: str, dim: int) -> dict[str, int]:
    """Train an IVF-PQ index of a column of (D,) vectors, in place of any before; its sizes.

    Four dimensions share a code where D allows it, and a partition holds about a thousand rows.
    """
    partitions = max(1, round(table.count_rows() / _ROWS_PER_PARTITION))
    codes = next(dim // n for n in (_DIMS_PER_CODE, 2, 1) if dim % n == 0)
    table.create_index(
        "cosine",
        num_partitions=partitions,
        num_sub_vectors=codes,
        vector_column_name=column,
        sample_rate=_SAMPLES,
        max_iterations=_ROUNDS,
        name=index_name(column),
    )
    return {"partitions": partitions, "sub_vectors": codes}


def index_name(column: str) -> str:
    """What the index of a column is called."""
    return f"{column}_ivf_pq"


def nearest(
    table: Any,
    column: str,
    query_D: Singles,
    k: int,
    columns: Sequence[str],
    how: Approximate | None = None,
    where: str | None = None,
) -> Any:
    """An Arrow table of the K nearest by cosine, the nearest first, with `_distance` = 1 - cosine.

    how: None = exact. The fewer rows a filter keeps, the further they are from the query and the
    more partitions are looked at; the power is that of tests/benchmarks/search_scale.py.
    """
    query = table.search(query_D, vector_column_name=column).distance_type("cosine")
    query = query.select([*columns, "_distance"]).limit(k)
    if where is not None:
        query = query.where(where, prefilter=True)
    if how is None:
        return query.bypass_vector_index().to_arrow()
    probes = how.probes
    if where is not None:
        share = max(1, table.count_rows(where)) / table.count_rows()
        probes = math.ceil(probes * share**-FILTERED)
    return query.nprobes(probes).refine_factor(how.refine).to_arrow()


def blocks(table: Any, column: str, where: str | None = None) -> Iterator[Singles]:
    """The vectors of a column, some (rows, D) at a time."""
    query = table.search().select([column])
    query = query if where is None else query.where(where)
    for batch in query.to_batches(batch_size=_BLOCK):
        if batch.num_rows:
            flat = batch.column(column).flatten().to_numpy(zero_copy_only=False)
            yield flat.reshape(batch.num_rows, -1)


def kth_best(table: Any, column: str, queries_QD: Singles, where: str | None = None) -> Singles:
    """(Q,) cosine of the K-th nearest row of each unit query, by comparing all rows."""
    best_QK = np.full((len(queries_QD), K), -np.inf, dtype=np.float32)
    for rows_ND in blocks(table, column, where):
        merged = np.concatenate([best_QK, queries_QD @ rows_ND.T], axis=1)
        best_QK = -np.partition(-merged, K - 1, axis=1)[:, :K]
    kth_Q: Singles = best_QK.min(1)
    return kth_Q


def recall(
    table: Any,
    column: str,
    queries_QD: Singles,
    kth_Q: Singles,
    how: Approximate | None,
    where: str | None = None,
) -> float:
    """Recall@10: found rows that are no further than the exact tenth, by ten; mean of queries."""
    asked = zip(queries_QD, kth_Q, strict=True)
    hits = [hit_share(nearest(table, column, q_D, K, [], how, where), kth) for q_D, kth in asked]
    return float(np.mean(hits))


def hit_share(found: Any, kth: float) -> float:
    """Of the ten rows that should have been found, the share that was; kth: see `kth_best`."""
    cosines = 1 - found["_distance"].to_numpy()
    if not math.isfinite(kth):  # there are fewer than ten
        return 1.0
    return min(1.0, float((cosines >= kth - _TIE).sum()) / K)


def tune(
    table: Any, column: str, queries: dict[str, Singles], target: float
) -> tuple[Approximate, dict[str, float]]:
    """The fewest probes with which every set of unit queries reaches a recall, and the recalls.

    Where none does, the most are taken; the recalls tell.
    """
    kth = {name: kth_best(table, column, queries_QD) for name, queries_QD in queries.items()}
    found: dict[str, float] = {}
    how = Approximate(PROBES[0])
    for probes in PROBES:
        how = Approximate(probes)
        found = {n: round(recall(table, column, queries[n], kth[n], how), 4) for n in queries}
        if min(found.values()) >= target:
            break
    return how, found
