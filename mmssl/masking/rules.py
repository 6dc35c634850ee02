"""Masks of independent cells: all, random ones, and the same ones at all times.

Letters in shapes: P rows, N tokens in row-major order of a grid, S cells of one frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.masking.order import Grid, first, shape_of, share_of, tokens_of, valid_of
from mmssl.rng import row_bits


def all_mask(
    seeds_P: Tensor, grid: Grid, valid_PN: Tensor | None = None, stream: str = "mask"
) -> Tensor:
    """Every valid token, for targets that say themselves what is altered."""
    like_PN = torch.zeros(len(seeds_P), tokens_of(grid), dtype=torch.bool, device=seeds_P.device)
    return valid_of(like_PN, valid_PN)


def random_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide exactly round(ratio * valid tokens) tokens of each row (He et al. 2022, MAE)."""
    order_PN = row_bits(seeds_P, tokens_of(grid), stream)
    valid_PN = valid_of(order_PN, valid_PN)
    return first(order_PN, valid_PN, share_of(ratio, valid_PN))


def tube_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide the same round(ratio * H * W) cells of a (T, H, W) grid at all times (VideoMAE, 2022).

    Raises:
        ValueError: the grid is not three-dimensional.
    """
    size = shape_of(grid)
    if len(size) != 3:
        raise ValueError(f"tube_mask: needs a (time, height, width) grid, got {size}")
    cells_PS = random_mask(seeds_P, size[1] * size[2], ratio, stream=stream)
    hidden_PN = cells_PS.repeat(1, size[0])
    return hidden_PN & valid_of(hidden_PN, valid_PN)
