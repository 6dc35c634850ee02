"""Several batches as one: what a rank reads that does the work of several.

Letters in shapes: B rows, L slots, P present items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.data.labels import NO_LABEL
from mmssl.types import Batch, FrameLabels, ViewBatch


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches in their order, as if they had been collated together."""
    if len(batches) == 1:
        return batches[0]
    first_rows = [0, *accumulate(batch.size for batch in batches)][:-1]
    names = batches[0].views
    return Batch(
        views={n: _joined([b.views[n] for b in batches], first_rows) for n in names},
        keys=[key for batch in batches for key in batch.keys],
        source_B=torch.cat([batch.source_B for batch in batches]),
        text_B=torch.cat([batch.text_B for batch in batches]),
        index_B=torch.cat([batch.index_B for batch in batches]),
        meta=[meta for batch in batches for meta in batch.meta],
    )


def _joined(views: Sequence[ViewBatch], first_rows: Sequence[int]) -> ViewBatch:
    present_BL = torch.cat([view.present_BL for view in views])
    # a dummy stands for nothing as soon as there are other items
    real = [(v, first) for v, first in zip(views, first_rows, strict=True) if not v.dummy]
    if not real:
        return replace(views[0], present_BL=present_BL)
    kept = [view for view, _ in real]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(view, name) for view in kept])
        for name in kept[0].columns().keys() - {"data", "rows_P"}
    }
    labels = {
        name: FrameLabels(_padded([v.labels[name].ids for v in kept], NO_LABEL), labels.rate_hz)
        for name, labels in kept[0].labels.items()
    }
    return replace(
        kept[0],
        **columns,
        data=_padded([view.data for view in kept]),
        rows_P=torch.cat([view.rows_P + first for view, first in real]),
        present_BL=present_BL,
        labels=labels,
    )


def _padded(parts: Sequence[Tensor], value: int = 0) -> Tensor:
    """Concatenated along the items, padded behind the second axis to the longest."""
    longest = max(part.shape[1] for part in parts)
    ends = [(0, 0) * (part.dim() - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([F.pad(p, end, value=value) for p, end in zip(parts, ends, strict=True)])
