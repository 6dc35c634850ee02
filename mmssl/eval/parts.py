"""The same test set by parts: clips grouped by a field of their description.

Letters in shapes: N rows of the test set, P rows kept for localization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mmssl.eval.embed import DenseRows, Encoded, Ints, Rows
from mmssl.types import UserError


def split(rows: Rows, field: str) -> dict[str, Ints]:
    """Row numbers by value of a field of the clips' meta; rows without it are in no part.

    Raises:
        UserError: no row has the field; names those there are.
    """
    found: dict[str, list[int]] = {}
    for row, meta in enumerate(rows.meta):
        if meta.get(field) is not None:
            found.setdefault(str(meta[field]), []).append(row)
    if not found:
        raise no_field("split_by", field, rows.meta)
    return {value: np.asarray(found[value], dtype=np.int64) for value in sorted(found)}


def no_field(option: str, field: str, metas: Iterable[Mapping[str, Any]]) -> UserError:
    """The error that names the fields the clips have."""
    known = ", ".join(sorted({name for meta in metas for name in meta}))
    if not field:
        return UserError(f"give {option}=FIELD, a field of the clips' meta; there are {known}")
    return UserError(f"{option}={field}: no clip of this data has that field; there are {known}")


def take(rows: Rows, encoded: Encoded, kept: Ints) -> tuple[Rows, Encoded]:
    """The kept rows (ascending numbers) as a test set of their own.

    Masked prediction is left out: its statistics are summed over the whole set.
    """
    few = Rows(
        keys=[rows.keys[i] for i in kept],
        sources=[rows.sources[i] for i in kept],
        texts=[rows.texts[i] for i in kept],
        meta=[rows.meta[i] for i in kept],
    )
    return few, Encoded(
        vectors={key: value[kept] for key, value in encoded.vectors.items()},
        present={key: value[kept] for key, value in encoded.present.items()},
        dense=None if encoded.dense is None else _take_dense(encoded.dense, kept),
        tables={pair: table.take(kept) for pair, table in encoded.tables.items()},
        own_N=None if encoded.own_N is None else encoded.own_N[kept],
        other_N=None if encoded.other_N is None else encoded.other_N[kept],
    )


def _take_dense(dense: DenseRows, kept: Ints) -> DenseRows:
    inside_P = np.flatnonzero(np.isin(dense.rows_P, kept))
    return replace(
        dense,
        rows_P=np.searchsorted(kept, dense.rows_P[inside_P]),
        video_PTSD=dense.video_PTSD[inside_P],
        audio_PAD=dense.audio_PAD[inside_P],
        valid_PA=dense.valid_PA[inside_P],
        times_PT=dense.times_PT[inside_P],
        loud_PT=dense.loud_PT[inside_P],
    )
