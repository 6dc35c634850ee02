"""What every mask rule is made of: grids, valid tokens, exact counts and random orders.

Letters in shapes: P rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

Grid: TypeAlias = int | Sequence[int]

LAST = torch.iinfo(torch.int64).max


def shape_of(grid: Grid) -> tuple[int, ...]:
    """The axes of a grid; a number of tokens is one axis."""
    return (grid,) if isinstance(grid, int) else tuple(grid)


def plane_of(grid: Grid) -> tuple[int, ...]:
    """The axes of a grid; the single time step of a still picture is left out."""
    shape = shape_of(grid)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def tokens_of(grid: Grid) -> int:
    """How many tokens a grid has."""
    return prod(shape_of(grid))


def valid_of(like_PN: Tensor, valid_PN: Tensor | None) -> Tensor:
    """The tokens that may be hidden; all where none are named.

    Raises:
        ValueError: the marks do not have the grid's number of tokens.
    """
    if valid_PN is None:
        return torch.ones_like(like_PN, dtype=torch.bool)
    if valid_PN.shape != like_PN.shape:
        raise ValueError(
            f"mask: valid {tuple(valid_PN.shape)} does not match {tuple(like_PN.shape)} tokens"
        )
    return valid_PN


def share_of(ratio: float, valid_PN: Tensor) -> Tensor:
    """(P,) round(ratio * valid tokens), halves to even as Python's `round`."""
    return (ratio * valid_PN.sum(1).double()).round().long()


def upto(u: Tensor, top: Tensor | int) -> Tensor:
    """Whole numbers uniform in {0 .. top} (inclusive) from u uniform in [0, 1)."""
    # In fp64: (1 - 2^-24) * (top + 1) rounds to top + 1 in fp32.
    return (u.double() * (top + 1)).floor().long()


def first(order_PN: Tensor, valid_PN: Tensor, count_P: Tensor) -> Tensor:
    """Mark the `count_P` valid tokens of each row that come first in the order."""
    rank_PN = rank(torch.where(valid_PN, order_PN, torch.full_like(order_PN, LAST)))
    return (rank_PN < count_P[:, None]) & valid_PN


def rank(key_PN: Tensor, tie_PN: Tensor | None = None) -> Tensor:
    """(P, N) int64 place of each element in its sorted row; equal keys are ordered by `tie_PN`."""
    if tie_PN is None:
        return key_PN.argsort(dim=1, stable=True).argsort(dim=1)
    by_tie_PN = tie_PN.argsort(dim=1, stable=True)
    by_key_PN = key_PN.gather(1, by_tie_PN).argsort(dim=1, stable=True)
    return by_tie_PN.gather(1, by_key_PN).argsort(dim=1)
