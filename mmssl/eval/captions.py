"""Retrieval with every caption of a clip: one text is asked for, or found, among all of them.

Letters in shapes: N clips, C captions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmssl.eval import measure
from mmssl.eval.embed import Encoded, Rows, frozen
from mmssl.eval.items import Metrics
from mmssl.eval.retrieval import CUTS, ranks, summary
from mmssl.eval.session import Session, progress
from mmssl.types import UserError

if TYPE_CHECKING:
    from mmssl.model import Model

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]


@dataclass(frozen=True)
class Captions:
    """Unit vectors (C, D) of all captions by space, and the row of each one's clip."""

    owner_C: Ints
    vectors: Mapping[str, Singles]


def encode(session: Session, rows: Rows, model: Model) -> Captions:
    """Encode every caption of every clip.

    Raises:
        UserError: the run has no text view, or reads documents instead of captions.
    """
    from mmssl.data.collate import Item, collate
    from mmssl.views.clip import cut_text
    from mmssl.views.plan import Cut

    name, view = session.view_of("text")
    if view.segments is not None:
        raise UserError(f"captions=all: views.{name} reads documents; leave the option out")
    pairs = [(row, text) for row, meta in enumerate(rows.meta) for text in meta.get("captions", ())]
    device, size = next(iter(model.parameters())).device, session.options.micro_batch
    parts: dict[str, list[Singles]] = {}
    starts = range(0, len(pairs), size)
    with frozen([model]):
        for begin in progress(starts, "captions", len(starts)):
            items = []
            for number, (_, text) in enumerate(pairs[begin : begin + size], start=begin):
                views = cut_text([text], Cut(name, view, 0.0, 0.0, 0), session.tokenizer)
                items.append(Item(str(number), "", number, [text], {name: views}))
            batch = collate(items, session.spec.views).to(device)
            for (modality, space), (vectors, _) in model.embed(batch).items():
                if modality == "text":
                    parts.setdefault(space, []).append(vectors.float().cpu().numpy())
    owners = np.asarray([row for row, _ in pairs], dtype=np.int64)
    return Captions(owners, {space: np.concatenate(found) for space, found in parts.items()})


def retrieval(rows: Rows, encoded: Encoded, captions: Captions, model: Model) -> Metrics:
    """All directions with text: `r_at_k` are hit rates, `recall_at_k` shares of what is relevant.

    Asked with a text, the clip is to be found; asked with a clip, all of its captions.
    """
    return {
        name: _one_direction(rows, encoded, captions, name, legs)
        for name, legs in measure.legs_of(encoded, model.space_for).items()
        if "text" in name
    }


def _one_direction(
    rows: Rows, encoded: Encoded, captions: Captions, name: str, legs: measure.Legs
) -> Metrics:
    others = [(base if query == "text" else query, space) for query, base, space in legs]
    there = measure.candidates(rows) & np.isin(np.arange(len(rows.keys)), captions.owner_C)
    for modality, space in others:
        there &= encoded.present[modality, space]
    kept, said = np.flatnonzero(there), there[captions.owner_C]
    if len(kept) == 0:
        return {"n": 0, "captions": 0}
    clips = np.concatenate([encoded.vectors[key][kept] for key in others], axis=1)
    texts = np.concatenate([captions.vectors[space][said] for _, space in others], axis=1)
    owners = captions.owner_C[said]
    asked = name.startswith("text->")
    found = ranks(texts, clips, owners, kept) if asked else ranks(clips, texts, kept, owners)
    recalls = zip(CUTS, found.recall_QK.mean(axis=0), strict=True)
    return {
        **summary(found),
        **{f"recall_at_{k}": float(value) for k, value in recalls},
        "n": len(found.pool_Q),
        "captions": len(owners),
    }
