"""`mmssl index build DATA model=RUN out=DB`: vectors into tables that can be searched.

DATA is a folder of shards, of media files, or of what `mmssl embed` has written, which is also
where several processes help. The same command again adds what is new; killed, it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import Field
from tqdm import tqdm

from mmssl.eval.options import parse
from mmssl.index import ann, vectors
from mmssl.index.ann import Singles
from mmssl.index.store import (
    MOMENTS,
    RECORD,
    UNFINISHED,
    Index,
    Key,
    Record,
    copies,
    quoted,
    table_name,
)
from mmssl.index.vectors import EmbedSpec, Facts, Row
from mmssl.types import UserError

_AUTO_ROWS = 100_000  # exact search takes about a tenth of a second up to here
_VECTORS = "vectors"  # folder below the index for vectors that are made here
_QUERIES = 200  # rows of each modality with which recall is measured
_IN_LIST = 1000  # names in one condition
_SHARED = "share `mmssl embed DATA model=RUN out=VECTORS` among several, then index VECTORS in one"
_GROWN = 2.0  # an index is trained anew once the table has so many times its rows


class BuildSpec(EmbedSpec):
    """What can be set behind `mmssl index build DATA`."""

    approximate: Literal["auto", "yes", "no"] = "auto"  # IVF-PQ; auto = of 100,000 rows and more
    recall: float = Field(0.9, gt=0, le=1)  # recall@10 that it is to reach


def main(action: str, data: str, overrides: Sequence[str] = ()) -> None:
    """Build an index or add to it.

    Raises:
        UserError: no such data or run, or vectors of another model than the index has.
    """
    if action != "build":
        raise UserError(f"index: no `{action}`; write mmssl index build DATA model=RUN out=DB")
    build(data, parse(BuildSpec, overrides))


def build(data: str, options: BuildSpec) -> None:
    """See `main`."""
    if not options.out:
        raise UserError("index build: out=FOLDER is needed")
    if vectors.share(os.environ)[1] > 1:
        raise UserError(f"index build: is the work of one process; {_SHARED}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            _build(data, out, options)
    except Timeout as error:
        raise UserError(
            f"{out}: another process builds this index; wait for it, or {_SHARED}"
        ) from error


def _build(data: str, out: Path, options: BuildSpec) -> None:
    source = Path(data)
    if vectors.read_facts(source):
        unread = options.model_fields_set & (set(EmbedSpec.model_fields) - {"out"})
        if unread:
            raise UserError(
                f"index build: {', '.join(sorted(unread))} cannot be chosen for {data}, whose "
                "vectors are made; leave it out, or name the shards or media files as DATA"
            )
    else:
        if not options.model:
            raise UserError("index build: model=RUN is needed, but for a folder of `mmssl embed`")
        source = out / _VECTORS
        vectors.embed(data, source, options)
    parts = vectors.read_facts(source)
    index = _opened(out, parts)
    newest = {(f.folder, u.name): path for path, f in _by_age(parts) for u in f.units}
    new = [p for p, facts in parts.items() if index.record.parts.get(p.name, 0) < facts.made]
    if new:  # said before any table changes: of which model they are, and that they are unfinished
        index.record.calibrated = UNFINISHED
        index.save()
    for path in tqdm(new, desc="index", unit="file", disable=None):
        facts = parts[path]
        units = {u.name for u in facts.units if newest[facts.folder, u.name] == path}
        _add(index, path, facts, units)
    if not index.keys:
        raise UserError(f"{data}: nothing was embedded, there is nothing to index")
    if index.record.calibrated == UNFINISHED or not (out / MOMENTS).is_file():
        _settle(index)
    _approximate(index, options)
    print(report(index))


def _by_age(parts: dict[Path, Facts]) -> Iterable[tuple[Path, Facts]]:
    return sorted(parts.items(), key=lambda item: item[1].made)


def _opened(out: Path, parts: dict[Path, Facts]) -> Index:
    """The index, new or as it is, if all files are of its model."""
    first = next(iter(parts.values()))
    if (out / RECORD).is_file():
        index = Index.open(out)
    else:
        index = Index(out, Record(first.model, first.run, first.which))
    for path, facts in parts.items():
        if facts.model != index.record.model:
            raise UserError(
                f"{path}: vectors of the model {facts.model[:12]} ({facts.run}), but {out} is of "
                f"{index.record.model[:12]} ({index.record.run}); models are never mixed: name "
                "another out="
            )
    return index


def _add(index: Index, path: Path, facts: Facts, units: set[str]) -> None:
    """Rows of a file to their tables; a row that is there is replaced, never doubled.

    units: those that no newer file holds. What the tables had of the same shards, files and keys
    before goes.
    """
    table, part = vectors.parquet().read_table(path), f"{path.name} {facts.made}"
    rows = [r | {"part": part} for r in table.to_pylist() if (r["shard"] or r["key"]) in units]
    for key in dict.fromkeys((r["space"], r["modality"]) for r in rows):
        some = [r for r in rows if (r["space"], r["modality"]) == key]
        _merge(index, key, some, _schema(rows, key, table.schema))
        held = index.record.spaces.setdefault(key[0], [])
        held += [key[1]] if key[1] not in held else []
    for names in _lists(sorted({r["key"] for r in rows} | units)):
        old = f"folder = {quoted(facts.folder)} AND (key IN {names} OR shard IN {names})"
        for key in index.keys:
            _delete(index, key, f"{old} AND part <> {quoted(part)}")
    index.record.parts[path.name] = facts.made
    index.save()


def _settle(index: Index) -> None:
    """After rows were added: few large files, all rows in the approximate index, new moments."""
    for key in index.keys:
        index.table(key).optimize()
        index.table(copies(key), index.table(key).schema).optimize()
    index.save_moments()


def _schema(rows: list[dict[str, Any]], key: Key, schema: Any) -> Any:
    """The schema of a table, whose vectors have one width."""
    import pyarrow as pa

    dim = next(len(r["vector"]) for r in rows if (r["space"], r["modality"]) == key)
    vector = pa.field("vector", pa.list_(pa.float32(), dim))
    schema = schema.set(schema.get_field_index("vector"), vector).remove_metadata()
    return schema.append(pa.field("part", pa.string()))


def _merge(index: Index, key: Key, rows: list[Row], schema: Any) -> None:
    """Rows into their table, which holds one of each content; those of other items beside it."""
    table, spare = index.table(key, schema), index.table(copies(key), schema)
    last = {r["id"]: r for r in rows}
    others = [r for r in [*_with(table, last), *rows] if _item(r) != _item(last[r["id"]])]
    _upsert(spare, others, ("folder", "key", "id"))
    _upsert(table, rows, ("id",))


def _delete(index: Index, key: Key, old: str) -> None:
    """Rows go; where another item has the same content, its row comes forward first."""
    table, spare = index.table(key), index.table(copies(key))
    spare.delete(old)
    gone = table.search().where(old).select(["id"]).to_arrow()["id"].to_pylist()
    _upsert(table, _with(spare, gone), ("id",))
    table.delete(old)


def _with(table: Any, ids: Iterable[str]) -> list[Row]:
    """The rows of some ids."""
    lists = (f"id IN {names}" for names in _lists(list(ids)))
    return [row for where in lists for row in table.search().where(where).to_arrow().to_pylist()]


def _item(row: Row) -> tuple[str, str]:
    return row["folder"], row["key"]


def _upsert(table: Any, rows: list[Row], on: tuple[str, ...]) -> None:
    """Insert rows or replace those that have the same columns `on`; of equal ones the last."""
    import pyarrow as pa

    if rows:
        distinct = {tuple(row[name] for name in on): row for row in rows}
        data = pa.Table.from_pylist(list(distinct.values()), table.schema)
        merge = table.merge_insert(on).when_matched_update_all().when_not_matched_insert_all()
        merge.execute(data)


def _lists(names: Sequence[str]) -> Iterator[str]:
    """Names as lists of SQL, some at a time."""
    for first in range(0, len(names), _IN_LIST):
        yield f"({', '.join(map(quoted, names[first : first + _IN_LIST]))})"


# ---------------------------------------------------------------- approximate search


def _approximate(index: Index, options: BuildSpec) -> None:
    """Train or leave the approximate index of every table, and measure its recall."""
    for key in index.keys:
        table, name = index.table(key), table_name(*key)
        rows, built = table.count_rows(), index.record.built.get(name)
        least = _AUTO_ROWS if options.approximate == "auto" else ann.MIN_ROWS
        if options.approximate == "no" or rows < least:
            if index.record.built.pop(name, None):
                index.save()
            continue
        asked = {"rows": rows, "target": options.recall}
        if built is not None and asked == {k: built[k] for k in asked}:
            continue
        if built is None or rows > _GROWN * built["trained"]:
            print(f"{name}: training an approximate index of {rows} rows")
            built = ann.train(table, "vector", table.schema.field("vector").type.list_size)
            built["trained"] = rows
        how, recall = ann.tune(table, "vector", _queries(index, key), options.recall)
        sizes = {k: built[k] for k in ("partitions", "sub_vectors", "trained")}
        index.record.built[name] = sizes | asked
        index.record.built[name] |= {"probes": how.probes, "refine": how.refine, "recall": recall}
        index.save()


def _queries(index: Index, key: Key) -> dict[str, Singles]:
    """Rows of every modality of a space, as queries."""
    found = {}
    for other in index.record.spaces[key[0]]:
        rows = index.sample((key[0], other), ["vector"], _QUERIES)
        if rows:
            found[other] = np.array([row["vector"] for row in rows], dtype=np.float32)
    return found


def report(index: Index) -> str:
    """Rows of every table and the recall of its approximate index."""
    lines = []
    for key in index.keys:
        name, rows = table_name(*key), index.table(key).count_rows()
        built = index.record.built.get(name)
        text = "exact search"
        if built is not None:
            recall = ", ".join(f"{m} {value:.3f}" for m, value in built["recall"].items())
            missed = min(built["recall"].values()) < built["target"]
            probes = min(built["probes"], built["partitions"])
            text = f"IVF-PQ, {probes} of {built['partitions']} partitions; recall@10 of "
            text += f"queries by modality: {recall}" + (" (MISSED the target)" if missed else "")
        lines.append(f"{name:24} {rows:9} rows   {text}")
    return "\n".join(lines)
