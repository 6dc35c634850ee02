"""What keeps dense similarities in shape, beside the contrast (DenseAV, Hamilton et al. 2024).

Letters in shapes: P pairs, U audio steps, N video cells, K heads. `sims_PUNK` are the similarities
of paired rows, valid_PUN marks those of valid steps and cells. Every penalty is one number per
pair, 0 for a pair with nothing valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def negative_part(sims_PUNK: Tensor, valid_PUN: Tensor) -> Tensor:
    """(P,) mean square of the similarities below 0: what does not belong together scores 0."""
    return _mean(sims_PUNK.clamp(max=0).square().mean(-1), valid_PUN)


def variation(sims_PUNK: Tensor, valid_PUN: Tensor) -> Tensor:
    """(P,) mean squared change of the sound's activation, its best similarity, per step."""
    best = sims_PUNK.masked_fill(~valid_PUN[..., None], -math.inf).amax((2, 3))
    valid_PU = valid_PUN.any(2)
    best = torch.where(valid_PU, best, torch.zeros_like(best))
    return _mean(best.diff(dim=1).square(), valid_PU[:, 1:] & valid_PU[:, :-1])


def overlap(sims_PUNK: Tensor, valid_PUN: Tensor) -> Tensor:
    """(P,) mean of |s_k s_l| summed over pairs of heads: heads answer for different things."""
    size = sims_PUNK.abs()
    pairs = (size.sum(-1).square() - size.square().sum(-1)) / 2
    return _mean(pairs, valid_PUN)


PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "negative": negative_part,
    "variation": variation,
    "overlap": overlap,
}


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    total = torch.where(valid, x, torch.zeros_like(x)).flatten(1).sum(1)
    return total / valid.flatten(1).sum(1).clamp(min=1)
