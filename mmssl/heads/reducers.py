"""Reductions of similarities over the last axis, over the marked entries only; 0 where none is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Space = Literal["max", "mean", "lse", "soft"]
Time = Literal["max", "mean"]
Reducer = Callable[[Tensor, Tensor | None], Tensor]


def reducer(name: Space | Time, sharpness: float = 10.0, above: float = 0.0) -> Reducer:
    """`max`, `mean`, `lse`: a soft maximum, or `soft`: the mean weighed by which entries are high.

    lse: ln(mean(exp(sharpness * x))) / sharpness. soft: weights sigmoid(sharpness * (x - above));
    of the low entries if `sharpness` is negative (LVS, Chen et al. 2021, eqs. 4-6).

    Raises:
        ValueError: an unknown name.
    """
    if name == "max":
        return _max
    if name == "mean":
        return _mean
    if name == "lse":
        return partial(_soft_max, sharpness=sharpness)
    if name == "soft":
        return partial(_soft_mean, sharpness=sharpness, above=above)
    raise ValueError(f"ScoreMap: reducer is max, mean, lse or soft, got {name!r}")


def _max(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.max(-1).values
    best = x.masked_fill(~mask, -math.inf).max(-1).values
    return torch.where(mask.any(-1), best, torch.zeros_like(best))


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(-1)
    total = torch.where(mask, x, torch.zeros_like(x)).sum(-1)
    return total / mask.sum(-1).clamp(min=1)


def _soft_max(x: Tensor, mask: Tensor | None, sharpness: float) -> Tensor:
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    lse = torch.logsumexp(_hidden(sharpness * x, mask), -1)
    lse = lse - mask.sum(-1).clamp(min=1).to(x.dtype).log()
    return torch.where(mask.any(-1), lse / sharpness, torch.zeros_like(lse))


def _soft_mean(x: Tensor, mask: Tensor | None, sharpness: float, above: float) -> Tensor:
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    # Weights in log space: far from the threshold all of them would round to zero.
    weight = torch.softmax(_hidden(F.logsigmoid(sharpness * (x - above)), mask), -1)
    return (torch.where(mask, x, torch.zeros_like(x)) * weight).sum(-1)


def _hidden(x: Tensor, mask: Tensor) -> Tensor:
    # Marked everywhere where nothing is marked: an lse of -inf alone has a NaN gradient.
    return x.masked_fill(~mask & mask.any(-1, keepdim=True), -math.inf)
