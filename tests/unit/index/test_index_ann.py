"""Approximate search: recall is measured against all rows, and what was promised is kept."""

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from mmssl.index import ann, build
from mmssl.index.ann import Approximate
from mmssl.index.build import BuildSpec
from mmssl.index.store import Index, Record

ROWS, DIM = 5000, 16


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def rows_and_queries(seed=0):
    """Rows around a hundred centres; queries near rows, moved by a constant."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((100, DIM))
    rows = unit(centres[rng.integers(0, 100, ROWS)] + 0.7 * rng.standard_normal((ROWS, DIM)))
    moved = rows[:50] + 0.1 * rng.standard_normal((50, DIM)) + 0.8 * unit(np.ones(DIM))
    return rows, unit(moved)


def as_table(rows):
    vectors = pa.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1])
    return pa.table({"number": np.arange(len(rows)), "vector": vectors})


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    rows, queries = rows_and_queries()
    table = lancedb.connect(tmp_path_factory.mktemp("ann")).create_table("rows", as_table(rows))
    sizes = ann.train(table, "vector", DIM)
    assert sizes == {"partitions": 5, "sub_vectors": 4}
    return table, rows, queries


def test_the_tenth_best_is_that_of_a_full_sort(indexed):
    table, rows, queries = indexed
    wanted = np.sort(queries @ rows.T, axis=1)[:, -10]
    np.testing.assert_allclose(ann.kth_best(table, "vector", queries), wanted, atol=1e-6)
    few = np.sort(queries @ rows[:30].T, axis=1)[:, -10]
    found = ann.kth_best(table, "vector", queries, "number < 30")
    np.testing.assert_allclose(found, few, atol=1e-6)


def test_exact_and_approximate_search_against_a_full_sort(indexed):
    table, rows, queries = indexed
    found = [ann.nearest(table, "vector", q, 10, ["number"])["number"].to_pylist() for q in queries]
    wanted = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    assert found == wanted.tolist()
    kth = ann.kth_best(table, "vector", queries)
    assert ann.recall(table, "vector", queries, kth, None) == 1
    how = Approximate(1, 1)
    few = [
        ann.nearest(table, "vector", q, 10, ["number"], how)["number"].to_pylist() for q in queries
    ]
    share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(few, wanted.tolist(), strict=True)])
    assert 0.2 < share < 0.95  # one partition of five, ranked by codes
    assert ann.recall(table, "vector", queries, kth, how) == pytest.approx(share, abs=0.01)


def test_probes_are_added_until_the_recall_is_reached(indexed, monkeypatch):
    table, rows, queries = indexed
    monkeypatch.setattr(ann, "PROBES", (1, 2, 5))
    sets = {"moved": queries, "rows": rows[:50]}
    how, found = ann.tune(table, "vector", sets, 0.99)
    assert how == Approximate(5)
    assert min(found.values()) >= 0.99
    less, _ = ann.tune(table, "vector", sets, 0.1)
    assert less == Approximate(1)


def test_a_filter_is_given_more_partitions(indexed, monkeypatch):
    """One row of a hundred is kept: 100^(1/3) = 4.6 times as many, here all five."""
    table, rows, queries = indexed
    condition, kept = "number % 100 = 3", np.arange(3, ROWS, 100)
    asked = dict(columns=["number"], how=Approximate(1), where=condition)
    whole = [ann.nearest(table, "vector", q, 10, **asked)["number"].to_pylist() for q in queries]
    wanted = [kept[np.argsort(-(q @ rows[kept].T))[:10]].tolist() for q in queries]
    assert whole == wanted  # 50 rows, fewer than are ranked by their vectors
    kth = ann.kth_best(table, "vector", queries, condition)
    assert ann.recall(table, "vector", queries, kth, Approximate(1), condition) == 1
    monkeypatch.setattr(ann, "FILTERED", 0)
    assert ann.recall(table, "vector", queries, kth, Approximate(1), condition) < 0.9


def test_an_index_measures_and_keeps_its_recall(tmp_path, capsys):
    """Built where it is asked for, told, extended by what is added, trained anew when grown."""
    rows, queries = rows_and_queries()
    index = Index(tmp_path, Record("hash", "run", "ema"))
    for modality, vectors in (("audio", rows), ("text", queries)):
        index.record.spaces.setdefault("s", []).append(modality)
        index.table(("s", modality), as_table(vectors).schema).add(as_table(vectors))
    build._approximate(index, BuildSpec())
    assert index.record.built == {}  # too few rows to be worth it
    build._approximate(index, BuildSpec(approximate="yes", recall=0.95))
    built = Index.open(tmp_path).record.built
    assert set(built) == {"s.audio"}  # fifty texts are compared one by one
    assert set(built["s.audio"]["recall"]) == {"audio", "text"}
    assert min(built["s.audio"]["recall"].values()) >= 0.95
    assert (built["s.audio"]["rows"], built["s.audio"]["trained"]) == (ROWS, ROWS)
    told = build.report(index)
    assert "IVF-PQ, 5 of 5 partitions; recall@10 of queries by modality: audio 1.000" in told
    assert "50 rows   exact search" in told
    index.table(("s", "audio")).add(as_table(rows_and_queries(1)[0][:100]))
    build._settle(index)
    build._approximate(index, BuildSpec(approximate="yes", recall=0.95))
    built = index.record.built["s.audio"]
    assert (built["rows"], built["trained"]) == (ROWS + 100, ROWS)
    stats = index.table(("s", "audio")).index_stats(ann.index_name("vector"))
    assert stats.num_unindexed_rows == 0
    build._approximate(index, BuildSpec(approximate="no"))
    assert index.approximate(("s", "audio")) is None
    assert "training" in capsys.readouterr().out
