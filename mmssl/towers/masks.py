"""What a masked pass hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Hide = Literal["cells", "latents", "features", "drop"]


@dataclass(frozen=True)
class Mask:
    """What a masked pass hides.

    name: distinguishes passes of one view. hidden_PN: True where a token is hidden.
    hide: `cells` zeroes the input cells before the stem reads them, and adds the embedding to the
    tokens behind it; `latents` puts the embedding in the place of what the stem makes of them
    (wav2vec 2.0); `features` puts it in the place of the stem's latents, before they are mapped to
    the tower's width; `drop` leaves the tokens out of the backbone (MAE).
    embedding_D: marks hidden tokens; None with `altered`.
    altered: the stem's input to read instead of the view's own: ids (80/10/10) or changed frames.
    """

    name: str
    hidden_PN: Tensor
    hide: Hide = "cells"
    embedding_D: Tensor | None = None
    altered: Tensor | None = None


def hide_cells(
    signal: Tensor, hidden_PN: Tensor, grid: Sequence[int], cell: Sequence[int]
) -> Tensor:
    """Zero the input cells of hidden tokens, before any overlapping stem reads them.

    signal: (P, C, *axes); cell: inputs per token along each axis. Inputs behind the last whole
    cell belong to the last token.
    """
    mask = hidden_PN.reshape(-1, *grid)
    for axis, (size, step) in enumerate(zip(signal.shape[2:], cell, strict=True), start=1):
        index = torch.arange(size, device=mask.device).div(step, rounding_mode="floor")
        mask = mask.index_select(axis, index.clamp(max=mask.shape[axis] - 1))
    return signal.masked_fill(mask[:, None], 0.0)


def marked(x_PND: Tensor, mask: Mask) -> Tensor:
    """Tokens whose hidden ones carry, or are, the mask embedding."""
    assert mask.embedding_D is not None
    hidden, vector = mask.hidden_PN[..., None], mask.embedding_D.to(x_PND.dtype)
    return x_PND + hidden * vector if mask.hide == "cells" else torch.where(hidden, vector, x_PND)
