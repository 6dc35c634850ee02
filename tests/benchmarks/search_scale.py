"""Search among a million vectors: building, memory, latency, recall@10, a filter of 1 %.

    python tests/benchmarks/search_scale.py FOLDER [--rows 1000000]

FOLDER takes the table (2 GB at a million rows) and is emptied of it first. Vectors are unit vectors
around centres of a clustered law (sizes of clusters as 1 / rank). A query is what another modality
makes of a row: the row with noise of its own and, the same for all queries, a shift as large as the
gap between modalities of contrastive models (Liang et al. 2022, section 2: 0.82 between the means
of CLIP's pictures and texts, whose vectors have length 1).
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from mmssl.index import ann

DIM, CLUSTERS, CHUNK, SEED = 256, 5000, 50_000, 0
WITHIN, NOISE, GAP = 0.8, 1.0, 0.82  # lengths against that of a centre, a row, a unit vector
QUERIES, SPARSE = 400, 20  # one of so many for exact search
FILTERS = {"1 %": "part = 7", "10 %": "part < 10"}  # of a hundred


def unit(x_ND: np.ndarray) -> np.ndarray:
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def noise(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Rows of a length of about 1."""
    return rng.standard_normal((rows, DIM), dtype=np.float32) / np.sqrt(DIM)


def chunks(rows: int, centres: np.ndarray) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([SEED, 1])
    share = 1 / np.arange(1, len(centres) + 1)
    for first in range(0, rows, CHUNK):
        size = min(CHUNK, rows - first)
        chosen = rng.choice(len(centres), size, p=share / share.sum())
        yield unit(centres[chosen] + WITHIN * noise(rng, size))


def queries_of(rows_QD: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng([SEED, 2])
    shift_1D = unit(noise(rng, 1))
    return unit(unit(rows_QD + NOISE * noise(rng, len(rows_QD))) + GAP * shift_1D)


def build(folder: Path, rows: int) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """The table, queries and what building took."""
    centres = unit(noise(np.random.default_rng([SEED, 0]), CLUSTERS))
    kept, ingest_s, number = [], 0.0, 0
    schema = pa.schema(
        [("id", pa.int64()), ("part", pa.int32()), ("vector", pa.list_(pa.float32(), DIM))]
    )
    table = lancedb.connect(folder).create_table("rows", schema=schema, mode="overwrite")
    parts = np.random.default_rng([SEED, 3])
    every = max(1, rows // QUERIES)
    for x_ND in chunks(rows, centres):
        kept.append(x_ND[:: min(every, len(x_ND))])
        begin = time.perf_counter()
        ids = np.arange(number, number + len(x_ND))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), DIM)
        part = pa.array(parts.integers(0, 100, len(x_ND), dtype=np.int32))
        table.add(pa.table([pa.array(ids), part, vectors], schema=schema))
        ingest_s += time.perf_counter() - begin
        number += len(x_ND)
    begin, cpu = time.perf_counter(), time.process_time()
    sizes = ann.train(table, "vector", DIM)
    facts = {
        "ingest_s": ingest_s,
        "index_s": time.perf_counter() - begin,
        "index_core_s": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **sizes,
    }
    return table, queries_of(np.concatenate(kept)[:QUERIES]), facts


def measured(
    table: Any, queries_QD: np.ndarray, kth_Q: np.ndarray, how: Any, where: str | None = None
) -> dict[str, float]:
    """Recall, and percentiles of the time of a query, one after the other."""
    for query_D in queries_QD[:3]:
        ann.nearest(table, "vector", query_D, ann.K, ["id"], how, where)
    times, hits = [], []
    for query_D, kth in zip(queries_QD, kth_Q, strict=True):
        begin = time.perf_counter()
        found = ann.nearest(table, "vector", query_D, ann.K, ["id"], how, where)
        times.append(1000 * (time.perf_counter() - begin))
        hits.append(ann.hit_share(found, kth))
    p50, p95 = np.percentile(times, [50, 95])
    recall = float(np.mean(hits))
    return {"recall": recall, "p50_ms": float(p50), "p95_ms": float(p95), "n": len(times)}


def search(table: Any, queries_QD: np.ndarray) -> list[dict[str, Any]]:
    """Every way to ask; the last are filters, with as many partitions and with more."""
    kth_Q = ann.kth_best(table, "vector", queries_QD)
    few_QD, few_Q = queries_QD[::SPARSE], kth_Q[::SPARSE]
    found = [{"how": "exact", **measured(table, few_QD, few_Q, None)}]
    ways = [*(ann.Approximate(probes) for probes in ann.PROBES)]
    ways += [ann.Approximate(128, refine) for refine in (5, 10, 40)]
    for how in ways:
        row = measured(table, queries_QD, kth_Q, how)
        found.append({"how": f"{how.probes} probes, refine {how.refine}", **row})
    power, how = ann.FILTERED, ann.Approximate(128)
    for name, condition in FILTERS.items():
        kth_Q = ann.kth_best(table, "vector", queries_QD, condition)
        for ann.FILTERED in (0.0, power):
            text = "more probes, as is done" if ann.FILTERED else "128 probes"
            row = measured(table, queries_QD, kth_Q, how, condition)
            found.append({"how": f"filter of {name}, {text}", **row})
    return found


def markdown(found: dict[str, Any]) -> str:
    b = found["build"]
    lines = [
        "# Search among vectors",
        "",
        f"{found['rows']:,} unit vectors of width {DIM} in {CLUSTERS} clusters; queries are rows "
        f"with noise and the shift of another modality ({GAP}); IVF-PQ of {b['partitions']} "
        f"partitions and {b['sub_vectors']} bytes per row.",
        "",
        "| search | recall@10 | median ms | p95 ms | p95 / exact p95 | queries |",
        "|---|---|---|---|---|---|",
    ]
    exact = found["search"][0]["p95_ms"]
    lines += [
        f"| {r['how']} | {r['recall']:.3f} | {r['p50_ms']:.1f} | {r['p95_ms']:.1f} "
        f"| {r['p95_ms'] / exact:.3f} | {r['n']} |"
        for r in found["search"]
    ]
    machine, versions = found["machine"], found["versions"]
    lines += [
        "",
        f"Writing the rows took {b['ingest_s']:.0f} s, the index {b['index_s']:.0f} s "
        f"({b['index_core_s']:.0f} core-seconds); peak memory {b['peak_mb']:.0f} MB; on disk "
        f"{found['disk_mb']:.0f} MB, the vectors alone {4e-6 * DIM * found['rows']:.0f} MB.",
        "",
        f"{machine['processor']}, {machine['cores']} cores; load at the start "
        f"{found['load'][0]:.1f}, at the end {found['load'][1]:.1f}; lancedb "
        f"{versions['lancedb']}, seed {SEED}; {found['date']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    load = [_load()]
    folder = args.folder / "search_scale"
    shutil.rmtree(folder, ignore_errors=True)
    table, queries_QD, facts = build(folder, args.rows)
    print(facts, flush=True)
    found = search(table, queries_QD)
    from mmssl.eval import results  # imports torch: after the memory was measured

    found = {
        "rows": args.rows,
        "seed": SEED,
        "build": facts,
        "search": found,
        "disk_mb": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        "load": [*load, _load()],
        "date": datetime.now(UTC).date().isoformat(),
        "machine": results.machine(),
        "versions": results.versions() | {"lancedb": lancedb.__version__},
    }
    results.write(found, args.out / "search_scale.json")
    (args.out / "search_scale.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


def _load() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


if __name__ == "__main__":
    main()
