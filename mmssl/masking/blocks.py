"""Rectangles of a two-dimensional grid.

Letters in shapes: P rows, N tokens in row-major order of a (H, W) grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.masking.order import Grid, first, plane_of, rank, share_of, upto, valid_of
from mmssl.rng import row_bits, row_uniform


def block_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    block: Sequence[int] = (5, 5),
    inverse: bool = True,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide, or with `inverse` leave visible, rectangles of one size in a two-dimensional grid.

    Rectangles fall at random places, overlap and stick out of the grid (so that a border cell is
    covered as often as an inner one) until enough cells are covered; of the last rectangle only as
    many cells count as are missing. Exactly round(ratio * valid tokens) are hidden. Inverse blocks
    are those of data2vec 2.0 (Baevski et al. 2023) and EAT (Chen et al. 2024, 5x5 blocks, 0.8).

    Raises:
        ValueError: the grid is not two-dimensional.
    """
    size = plane_of(grid)
    if len(size) != 2 or len(block) != 2:
        raise ValueError(f"block_mask: needs a grid and a block of 2 axes, got {size}, {block}")
    high, wide = size[0] + block[0] - 1, size[1] + block[1] - 1
    # When a cell is covered first = the smallest arrival among the rectangles that contain it.
    arrival = row_bits(seeds_P, high * wide, stream).double().reshape(-1, 1, high, wide)
    covered = -F.max_pool2d(-arrival, kernel_size=tuple(block), stride=1)
    tie_PN = row_bits(seeds_P, prod(size), stream + "/tie")
    order_PN = rank(covered.flatten(1), tie_PN)
    valid_PN = valid_of(order_PN, valid_PN)
    hidden_P = share_of(ratio, valid_PN)
    if not inverse:
        return first(order_PN, valid_PN, hidden_P)
    return valid_PN & ~first(order_PN, valid_PN, valid_PN.sum(1) - hidden_P)


def beit_block_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    smallest: int = 16,
    aspect: float = 0.3,
    tries: int = 10,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide rectangles of random size and shape (BEiT, Bao et al. 2022; data2vec vision, 2022).

    A rectangle's area is uniform between `smallest` and what is still missing, its height / width
    log-uniform in [aspect, 1 / aspect], its place uniform. One that covers nothing new, more than
    is missing or a whole axis is refused; after `tries` refusals in a row the rest is filled with
    random cells, so that exactly round(ratio * valid tokens) are hidden. data2vec vision hides 120
    of 14 x 14 patches: ratio 120 / 196. Rectangles are drawn in the rectangle that the row's valid
    tokens span.

    Raises:
        ValueError: the grid is not two-dimensional.
    """
    size = plane_of(grid)
    if len(size) != 2:
        raise ValueError(f"beit_block_mask: needs a grid of 2 axes, got {size}")
    fill_PN = row_bits(seeds_P, prod(size), stream)
    valid_PN = valid_of(fill_PN, valid_PN)
    valid_PHW = valid_PN.reshape(-1, *size)
    sides = _extent(valid_PHW.any(2)), _extent(valid_PHW.any(1))
    hidden_PHW = torch.zeros_like(valid_PHW)
    missing_P = share_of(ratio, valid_PN)
    refused_P = torch.zeros_like(missing_P)
    attempt = 0
    while bool((open_P := (missing_P > 0) & (refused_P < tries)).any()):
        u_P4 = row_uniform(seeds_P, 4, f"{stream}/{attempt}").double()
        area_P = smallest + (missing_P - smallest) * u_P4[:, 0]
        block_PHW = _rectangles(u_P4, area_P, aspect, sides, size)
        fresh_PHW = block_PHW & valid_PHW & ~hidden_PHW
        gain_P = fresh_PHW.flatten(1).sum(1)
        take_P = open_P & (gain_P > 0) & (gain_P <= missing_P)
        hidden_PHW = hidden_PHW | (fresh_PHW & take_P[:, None, None])
        missing_P = missing_P - gain_P * take_P
        refused_P = torch.where(take_P, 0, refused_P + 1)
        attempt += 1
    hidden_PN = hidden_PHW.flatten(1)
    return hidden_PN | first(fill_PN, valid_PN & ~hidden_PN, missing_P)


def _extent(any_PL: Tensor) -> Tensor:
    """(P,) 1 + the last marked place of each row, 0 where none is."""
    return (any_PL * torch.arange(1, any_PL.shape[1] + 1, device=any_PL.device)).amax(1)


def _rectangles(
    u_P4: Tensor,
    area_P: Tensor,
    aspect: float,
    sides: tuple[Tensor, Tensor],
    size: tuple[int, ...],
) -> Tensor:
    """(P, H, W) bool: a rectangle in each row; none where it would span a whole axis."""
    shape_P = (log(aspect) * (1 - 2 * u_P4[:, 1])).exp()
    high_P = (area_P * shape_P).sqrt().round().long()
    wide_P = (area_P / shape_P).sqrt().round().long()
    fits_P = (high_P < sides[0]) & (wide_P < sides[1])
    top_P = upto(u_P4[:, 2], (sides[0] - high_P).clamp(min=0))
    left_P = upto(u_P4[:, 3], (sides[1] - wide_P).clamp(min=0))
    row_H, column_W = (torch.arange(n, device=u_P4.device) for n in size)
    rows_PH = (row_H >= top_P[:, None]) & (row_H < (top_P + high_P)[:, None])
    columns_PW = (column_W >= left_P[:, None]) & (column_W < (left_P + wide_P)[:, None])
    return rows_PH[:, :, None] & columns_PW[:, None, :] & fits_P[:, None, None]
