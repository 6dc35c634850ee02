"""`mmssl search DB QUERY...`: what fits words, sounds, videos, pictures, or several together.

Every query word is a file or a text; several are one query, the sum of their unit vectors. Each
result modality is searched in the space in which the model was trained to compare it with the
query's; the hits of all are put in one order by calibrated scores, see `mmssl.index.store`.

Letters in shapes: D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

import mmssl
from mmssl.embed.model import EmbeddingModel
from mmssl.eval.options import parse
from mmssl.files import is_file
from mmssl.index import ann
from mmssl.index.ann import Approximate, Singles
from mmssl.index.corpus import MEDIA, media_of
from mmssl.index.store import Index, Key
from mmssl.specs import Spec
from mmssl.types import MODALITIES, UserError

Query = dict[str, Any]  # modality to what `EmbeddingModel` reads

_SHOWN = ("key", "source", "modality", "start_s", "end_s", "duration_s", "caption", "meta")
_PLACE = ("folder", "shard", "number")
_WIDER = 4  # so many times the windows are asked for where they are of too few clips


class SearchSpec(Spec):
    """What can be set behind `mmssl search DB QUERY...`."""

    k: int = Field(10, gt=0)  # hits
    modality: str = ""  # of the hits, with commas; empty = all
    where: str = ""  # SQL condition on the columns of the index
    space: str = ""  # empty = the one in which query and hits were trained to be compared
    exact: bool = False  # compare all vectors although there is an approximate index
    probes: int = Field(0, ge=0)  # partitions that are looked at; 0 = as measured when it was built
    model: str = ""  # run folder; empty = where it was when the index was built
    device: str = "cpu"
    format: Literal["table", "json"] = "table"


@dataclass(frozen=True)
class Hit:
    """A window, or a text, that was found.

    score: standard deviations, comparable over modalities; cosine: in `space`. folder, shard,
    number: where the media are, see `Entry`. thumbnail: JPEG or None.
    """

    score: float
    cosine: float
    space: str
    modality: str
    key: str
    source: str
    start_s: float
    end_s: float
    duration_s: float
    caption: str
    meta: list[str]
    folder: str
    shard: str
    number: int
    thumbnail: bytes | None = field(default=None, repr=False)


def main(database: str, words: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Search, and print the hits as a table or as JSON.

    Raises:
        UserError: no such index or model, a query that cannot be read, or a wrong condition.
    """
    options = parse(SearchSpec, overrides)
    queries = [query_of(word) for word in words]
    index = Index.open(database)
    model = load_model(index, options.model, options.device)
    hits = search(index, model, queries, options)
    if options.format == "json":
        print(json.dumps([_without_picture(hit) for hit in hits], indent=1))
    else:
        print(table(hits))


def query_of(word: str) -> Query:
    """What a word of the command line asks: a file that exists, else the text itself.

    Raises:
        UserError: it is empty, names a media file that is not there, or one that cannot be read.
    """
    text, path = word.strip(), Path(word)
    if not text:
        raise UserError("search: the query is empty; give words or a file")
    if is_file(path):
        return media_of(path)
    if " " not in text and path.suffix[1:].lower() in MEDIA:
        raise UserError(f"{word}: no such file")
    return {"text": text}


def load_model(
    index: Index, run: str = "", device: str = "cpu", option: str = "model"
) -> EmbeddingModel:
    """The model of an index.

    run: where it is, by default where it was. option: how a user says so.

    Raises:
        UserError: it is not where it was, or there is another in its place.
    """
    place = Path(run or index.record.run)
    if not place.exists():
        raise UserError(f"{place}: no such run; say where the index's model is with {option}=RUN")
    which: Any = index.record.which
    model = mmssl.load(place, which, device)
    if model.hash != index.record.model:
        raise UserError(
            f"{place}: its model has the hash {model.hash[:12]}, but {index.folder} holds vectors "
            f"of {index.record.model[:12]}; name the run with {option}=RUN, or build an index anew"
        )
    return model


def search(
    index: Index,
    model: EmbeddingModel,
    queries: Sequence[Query],
    options: SearchSpec,
    once: bool = False,
) -> list[Hit]:
    """The best `k` hits of all modalities, the best first.

    queries: taken together as one. once: of every clip its best hit alone.

    Raises:
        UserError: nothing in the index can be compared with the query, a wrong condition, or an
        index that is not finished.
    """
    index.check_finished()
    keys = _keys(index, model, queries, options)
    where = options.where.strip() or None
    if where is not None:
        index.check_filter(where, keys)
    vectors = {space: _vector(model, queries, space) for space in {space for space, _ in keys}}
    count = options.k
    while True:
        wide = options.model_copy(update={"k": count})
        hits = [hit for key in keys for hit in _nearest(index, key, vectors[key[0]], wide, where)]
        hits = sorted(hits, key=lambda hit: (-hit.score, hit.key, hit.start_s))[:count]
        if not once:
            return hits
        best: dict[tuple[str, str], Hit] = {}
        for hit in hits:
            best.setdefault((hit.folder, hit.key), hit)
        if len(best) >= options.k or len(hits) < count:  # else more windows may tell more clips
            return list(best.values())[: options.k]
        count *= _WIDER


def _nearest(
    index: Index, key: Key, query_D: Singles, options: SearchSpec, where: str | None
) -> list[Hit]:
    how = None if options.exact else index.approximate(key)
    if how is not None and options.probes:
        how = Approximate(options.probes, how.refine)
    columns = [*_SHOWN, *_PLACE, "thumbnail"]
    found = ann.nearest(index.table(key), "vector", query_D, options.k, columns, how, where)
    rows = found.to_pylist()
    cosines = 1 - found["_distance"].to_numpy().astype(float)
    scores = index.scores(key, query_D, cosines)
    return [
        Hit(float(score), float(cosine), key[0], **{name: row[name] for name in columns})
        for row, score, cosine in zip(rows, scores, cosines, strict=True)
    ]


def _vector(model: EmbeddingModel, queries: Sequence[Query], space: str) -> Singles:
    """(D,) normalised sum of the unit vectors of several queries."""
    held = model.spaces[space]
    items = [{m: x for m, x in query.items() if m in held} for query in queries]
    z_D = model.encode(items, space=space).sum(0)
    if not bool(torch.isfinite(z_D).all()) or not float(z_D.norm()):
        raise UserError("search: the parts of the query cancel each other out; leave one out")
    vector: Singles = F.normalize(z_D, dim=0).numpy()
    return vector


# ---------------------------------------------------------------- which tables


def _keys(
    index: Index, model: EmbeddingModel, queries: Sequence[Query], options: SearchSpec
) -> list[Key]:
    """The table of every result modality that can be compared with all parts of the query."""
    spaces = index.record.spaces
    known = [m for m in MODALITIES if any(m in held for held in spaces.values())]
    wanted = [m.strip() for m in options.modality.split(",") if m.strip()] or known
    for modality in wanted:
        if modality not in known:
            raise UserError(f"modality={options.modality}: the index holds {', '.join(known)}")
    if options.space and options.space not in spaces:
        raise UserError(f"space={options.space}: the index has {', '.join(spaces)}")
    usable = [
        space
        for space in ([options.space] if options.space else spaces)
        if all(set(query) & set(model.spaces[space]) for query in queries)
    ]
    found = [(_best(model, queries, m, usable, spaces), m) for m in wanted]
    keys = [(space, m) for space, m in found if space is not None]
    if not keys:
        parts = " with ".join("/".join(query) for query in queries)
        told = ", ".join(f"{space} ({' '.join(held)})" for space, held in spaces.items())
        raise UserError(
            f"search: {parts} cannot be compared with {'/'.join(wanted)}: the spaces of the index "
            f"are {told}"
        )
    return keys


def _best(
    model: EmbeddingModel,
    queries: Sequence[Query],
    modality: str,
    usable: Sequence[str],
    spaces: dict[str, list[str]],
) -> str | None:
    """The space where most of the query was trained against a modality, then the widest."""
    asked = {m for query in queries for m in query}
    trained = [model.model.space_for(m, modality) for m in sorted(asked - {modality})]
    held = [space for space in usable if modality in spaces[space]]
    return max(
        held,
        key=lambda space: (trained.count(space), len(asked & set(model.spaces[space]))),
        default=None,
    )


# ---------------------------------------------------------------- the table in the terminal


def table(hits: Sequence[Hit]) -> str:
    """Hits as plain text: score, cosine, modality, time, key, caption."""
    if not hits:
        return "nothing found"
    width = min(40, max(len(hit.key) for hit in hits))
    lines = [f"{'score':>6} {'cosine':>7}  {'what':6} {'time (s)':>15}  {'key':{width}}  caption"]
    for hit in hits:
        span = "-" if hit.modality == "text" else f"{hit.start_s:.1f} - {hit.end_s:.1f}"
        key = hit.key if len(hit.key) <= width else f"...{hit.key[3 - width :]}"
        caption = " ".join(hit.caption.split())[:60]
        lines.append(
            f"{hit.score:6.2f} {hit.cosine:7.3f}  {hit.modality:6} {span:>15}  {key:{width}}  "
            f"{caption}".rstrip()
        )
    return "\n".join(lines)


def _without_picture(hit: Hit) -> dict[str, Any]:
    tree = asdict(hit)
    del tree["thumbnail"]
    return tree
