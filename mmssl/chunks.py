"""Encoding a batch in parts whose activations are computed again in the backward pass.

Letters in shapes: P items of the view.

Losses across rows need the embeddings of all rows, but not their activations at once: the first
pass keeps the outputs alone, the loss is taken over all of them, and the backward goes through part
after part, each encoded a second time with the gradient of its outputs at hand (Gao et al. 2021,
Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup). The gradient is that of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmssl.types import Tokens, ViewBatch

Encode = Callable[[ViewBatch, Any], Tokens]


def in_chunks(encode: Encode, view: ViewBatch, mask: Any, size: int) -> Tokens:
    """Tokens of a view whose items are encoded `size` by `size`; 0 encodes them at once.

    Args:
        encode: a view and its mask to tokens; items must not see each other.
        view: P items.
        mask: a record whose tensors of P items are cut likewise, or None.
        size: items of a part.
    """
    items = len(view.rows_P)
    if not 0 < size < items or not torch.is_grad_enabled():
        return encode(view, mask)
    parts = [
        checkpoint(
            encode,
            _cut(view, view.columns(), part),
            mask and _cut(mask, _columns(mask), part),
            use_reentrant=False,
        )
        for part in (slice(first, first + size) for first in range(0, items, size))
    ]
    return _joined(parts, view)


def _columns(mask: Any) -> dict[str, Tensor]:
    found = {"hidden_PN": mask.hidden_PN, "altered": mask.altered}
    return {name: column for name, column in found.items() if column is not None}


def _cut(record: Any, columns: Mapping[str, Tensor], part: slice) -> Any:
    return replace(record, **{name: column[part] for name, column in columns.items()})


def _joined(parts: Sequence[Tokens], view: ViewBatch) -> Tokens:
    first = parts[0]
    whole: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Tokens)
        if isinstance(getattr(first, field.name), Tensor)
    }
    extra = {name: torch.cat([part.extra[name] for part in parts]) for name in first.extra}
    return replace(first, **whole, extra=extra, view=view)
