"""Which tokens to hide: pure functions of per-row seeds.

Letters in shapes: P rows, N tokens in row-major order of a grid, (T, F) for spectrograms, (T, H, W)
for video.

Every rule has the form `rule(seeds_P, grid, <constants>, valid_PN=None, stream="mask")` and returns
(P, N) bool, True = hidden. `grid` is a shape or a number of tokens; `valid_PN` marks the tokens
that may be hidden (no padding, no special tokens; default all). A row's mask is a function of its
own seed and length alone, whatever batch, rank or device it is in. A caller that needs several
masks of one sample names several streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.rng import row_bits, row_uniform

Grid: TypeAlias = int | Sequence[int]

_LAST = torch.iinfo(torch.int64).max


def random_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide exactly round(ratio * valid tokens) tokens of each row (He et al. 2022, MAE)."""
    order_PN = row_bits(seeds_P, _tokens(grid), stream)
    valid_PN = _valid(order_PN, valid_PN)
    return _first(order_PN, valid_PN, _share(ratio, valid_PN))


def block_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float,
    block: Sequence[int] = (5, 5),
    inverse: bool = True,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide, or with `inverse` leave visible, rectangles of a two-dimensional grid.

    Rectangles fall at random places, overlap and stick out of the grid (so that a border cell is
    covered as often as an inner one) until enough cells are covered; of the last rectangle only as
    many cells count as are missing. Exactly round(ratio * valid tokens) are hidden. Inverse blocks
    are those of data2vec 2.0 (Baevski et al. 2023) and EAT (Chen et al. 2024, 5x5 blocks, 0.8).

    Raises:
        ValueError: the grid is not two-dimensional.
    """
    size = _shape(grid)
    if len(size) != 2 or len(block) != 2:
        raise ValueError(f"block_mask: needs a grid and a block of 2 axes, got {size}, {block}")
    high, wide = size[0] + block[0] - 1, size[1] + block[1] - 1
    # When a cell is covered first = the smallest arrival among the rectangles that contain it.
    arrival = row_bits(seeds_P, high * wide, stream).double().reshape(-1, 1, high, wide)
    first = -F.max_pool2d(-arrival, kernel_size=tuple(block), stride=1)
    tie_PN = row_bits(seeds_P, prod(size), stream + "/tie")
    order_PN = _rank(first.flatten(1), tie_PN)
    valid_PN = _valid(order_PN, valid_PN)
    hidden_P = _share(ratio, valid_PN)
    if not inverse:
        return _first(order_PN, valid_PN, hidden_P)
    return valid_PN & ~_first(order_PN, valid_PN, valid_PN.sum(1) - hidden_P)


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
    size = _shape(grid)
    if len(size) != 3:
        raise ValueError(f"tube_mask: needs a (time, height, width) grid, got {size}")
    cells_PS = random_mask(seeds_P, size[1] * size[2], ratio, stream=stream)
    hidden_PN = cells_PS.repeat(1, size[0])
    return hidden_PN & _valid(hidden_PN, valid_PN)


def span_mask(
    seeds_P: Tensor,
    grid: Grid,
    start_prob: float,
    length: int,
    min_spans: int = 1,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide spans of a sequence (wav2vec 2.0, Baevski et al. 2020).

    floor(start_prob * valid tokens + u), u uniform, and at least `min_spans` distinct starts among
    the places where a whole span fits; spans may overlap, so a fraction of about
    1 - (1 - start_prob)^length is hidden. Valid tokens must come first in a row. A row shorter than
    a span is hidden whole, a row without valid tokens not at all.
    """
    order_PN = row_bits(seeds_P, _tokens(grid), stream)
    valid_PN = _valid(order_PN, valid_PN)
    length_P = valid_PN.sum(1)
    u_P = row_uniform(seeds_P, 1, stream + "/count")[:, 0].double()
    spans_P = (start_prob * length_P.double() + u_P).floor().long().clamp(min=min_spans)
    place_N = torch.arange(order_PN.shape[1], device=order_PN.device)
    fits_PN = valid_PN & (place_N <= (length_P - length).clamp(min=0)[:, None])
    start_PN = _first(order_PN, fits_PN, spans_P).double()
    covered = F.max_pool1d(F.pad(start_PN, (length - 1, 0))[:, None], length, stride=1)
    return (covered[:, 0] > 0) & valid_PN


def token_mask(
    seeds_P: Tensor,
    grid: Grid,
    ratio: float = 0.15,
    valid_PN: Tensor | None = None,
    stream: str = "mask",
) -> Tensor:
    """Hide round(ratio * candidates) text tokens, at least one where there is one (BERT, 2019).

    `valid_PN` marks the candidates: neither padding nor special tokens.
    """
    order_PN = row_bits(seeds_P, _tokens(grid), stream)
    valid_PN = _valid(order_PN, valid_PN)
    return _first(order_PN, valid_PN, _share(ratio, valid_PN).clamp(min=1))


def corrupt_tokens(
    ids_PN: Tensor,
    hidden_PN: Tensor,
    seeds_P: Tensor,
    mask_id: int,
    random_ids: tuple[int, int],
    shares: tuple[float, float] = (0.8, 0.1),
    stream: str = "corrupt",
) -> Tensor:
    """Replace the hidden ids (BERT, 2019): 80 % by `mask_id`, 10 % by a random id, the rest stay.

    Args:
        ids_PN: int64 token ids.
        hidden_PN: bool, which to replace and to predict.
        seeds_P: int64 row seeds.
        mask_id: id of the mask token.
        random_ids: half-open range [low, high) of the random ids.
        shares: of mask tokens and of random ids; (1, 0) masks all.
        stream: name of the random stream.
    """
    low, high = random_ids
    n = ids_PN.shape[1]
    u_PN = row_uniform(seeds_P, n, stream)
    random_PN = low + row_bits(seeds_P, n, stream + "/id") % (high - low)
    masked_PN = u_PN < shares[0]
    swapped_PN = ~masked_PN & (u_PN < shares[0] + shares[1])
    out_PN = torch.where(hidden_PN & masked_PN, torch.full_like(ids_PN, mask_id), ids_PN)
    return torch.where(hidden_PN & swapped_PN, random_PN.to(ids_PN.dtype), out_PN)


RULES: dict[str, Callable[..., Tensor]] = {
    "random": random_mask,
    "blocks": block_mask,
    "tubes": tube_mask,
    "spans": span_mask,
    "words": token_mask,
}


def _shape(grid: Grid) -> tuple[int, ...]:
    return (grid,) if isinstance(grid, int) else tuple(grid)


def _tokens(grid: Grid) -> int:
    return prod(_shape(grid))


def _valid(like_PN: Tensor, valid_PN: Tensor | None) -> Tensor:
    if valid_PN is None:
        return torch.ones_like(like_PN, dtype=torch.bool)
    if valid_PN.shape != like_PN.shape:
        raise ValueError(
            f"mask: valid {tuple(valid_PN.shape)} does not match {tuple(like_PN.shape)} tokens"
        )
    return valid_PN


def _share(ratio: float, valid_PN: Tensor) -> Tensor:
    """(P,) round(ratio * valid tokens), halves to even as Python's `round`."""
    return (ratio * valid_PN.sum(1).double()).round().long()


def _first(order_PN: Tensor, valid_PN: Tensor, count_P: Tensor) -> Tensor:
    """Mark the `count_P` valid tokens of each row that come first in the order."""
    rank_PN = _rank(torch.where(valid_PN, order_PN, torch.full_like(order_PN, _LAST)))
    return (rank_PN < count_P[:, None]) & valid_PN


def _rank(key_PN: Tensor, tie_PN: Tensor | None = None) -> Tensor:
    """(P, N) int64 place of each element in its sorted row; equal keys are ordered by `tie_PN`."""
    if tie_PN is None:
        return key_PN.argsort(dim=1, stable=True).argsort(dim=1)
    by_tie_PN = tie_PN.argsort(dim=1, stable=True)
    by_key_PN = key_PN.gather(1, by_tie_PN).argsort(dim=1, stable=True)
    return by_tie_PN.gather(1, by_key_PN).argsort(dim=1)
