"""Relative positions as additive attention biases.

One learned number per head and bucket: T5's buckets of one axis (Raffel et al. 2020, section 2.1),
or one bucket per offset on a grid (BEiT, Bao et al. 2022; data2vec vision). WavLM (Chen et al.
2022, section III-A) lets each layer gate the bias by its own input.

B rows, H heads, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from mmssl.backbones.layers import linear
from mmssl.types import UserError


def relative_buckets(tokens: int, buckets: int = 32, max_distance: int = 64) -> Tensor:
    """(N, N) bucket of key minus query position.

    Half of the buckets serve each sign; of these, half hold one distance each and the rest grow
    logarithmically up to `max_distance`, beyond which all distances share the last bucket.
    """
    places = torch.arange(tokens)
    delta = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    distance = delta.abs()
    ratio = (distance.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    coarse = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, coarse) + half * (delta > 0)


@lru_cache(maxsize=16)
def grid_buckets(grid: tuple[int, ...], front: int) -> Tensor:
    """(N, N) bucket of query minus key place on a grid behind `front` tokens without a place.

    The offsets come first, row-major over 2 n - 1 values per axis; then one bucket for a front
    token that looks at the grid, one for the grid looking at it, one between front tokens.
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    index = torch.zeros(prod(grid), prod(grid), dtype=torch.long)
    for size, axis in zip(grid, axes, strict=True):
        place = axis.flatten()
        index = index * (2 * size - 1) + place[:, None] - place[None, :] + size - 1
    offsets = prod(2 * n - 1 for n in grid)
    full = torch.full((front + prod(grid),) * 2, offsets + 2)
    full[:front, front:] = offsets
    full[front:, :front] = offsets + 1
    full[front:, front:] = index
    return full


class RelativeBias(nn.Module):
    """(1, H, N, N) additive attention bias, one learned number per head and bucket."""

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 64) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Embedding(buckets, heads)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, tokens: int) -> Tensor:
        """Bias of a sequence of that many tokens."""
        index = relative_buckets(tokens, self.buckets, self.max_distance)
        bias: Tensor = self.table(index.to(self.table.weight.device))
        return bias.permute(2, 0, 1).unsqueeze(0)


class GridBias(nn.Module):
    """(1, H, N, N) additive attention bias of a fixed grid, zero at first.

    front: tokens before the grid (global tokens, registers); they have no place.
    """

    def __init__(self, heads: int, grid: Sequence[int], front: int = 0) -> None:
        super().__init__()
        self.grid, self.front = tuple(grid), front
        self.table = nn.Embedding(prod(2 * n - 1 for n in self.grid) + 3, heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens: int) -> Tensor:
        """Bias of the grid's tokens and those before it.

        Raises:
            UserError: another number of tokens.
        """
        if tokens != self.front + prod(self.grid):
            raise UserError(
                f"relative_grid: {tokens} tokens do not fill the grid {self.grid} behind "
                f"{self.front} front tokens; give the grid of the view, keep all tokens "
                "(drop_tokens 0), or use relative_buckets"
            )
        index = grid_buckets(self.grid, self.front)
        bias: Tensor = self.table(index.to(self.table.weight.device))
        return bias.permute(2, 0, 1).unsqueeze(0)


class RelativeGate(nn.Module):
    """A layer's factor (B, H, N, 1) on the shared bias, per query and head.

    From u, the head's slice of the layer's attention input: (a, b) = sigmoid of the sums over four
    outputs each of one linear map that all heads share; factor = a (b c - 1) + 2, with c learned
    per head, 1 at first. A zero map gives 1.75.
    """

    def __init__(self, width: int, heads: int, init: str = "xavier") -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"relative_use: a gate needs a width ({width}) of whole slices per head ({heads}); "
                "change heads"
            )
        self.heads = heads
        self.linear = linear(width // heads, 8, init)
        self.scale_H = nn.Parameter(torch.ones(heads))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Factor of every query of the attention input."""
        rows, tokens, _ = x_BND.shape
        parts = self.linear(x_BND.reshape(rows, tokens, self.heads, -1))
        a_BNH, b_BNH = parts.view(rows, tokens, self.heads, 2, 4).sum(-1).sigmoid().unbind(-1)
        factor: Tensor = a_BNH * (b_BNH * self.scale_H - 1.0) + 2.0
        return factor.transpose(1, 2).unsqueeze(-1)
