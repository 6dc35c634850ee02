"""Positions that are not learned: sines and cosines.

P items, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from mmssl.types import UserError

LAYOUTS = ("interleaved", "axes")


@lru_cache(maxsize=64)
def interleaved_table(tokens: int, width: int) -> Tensor:
    """(N, D) fp32: sine at even, cosine at odd channels (Vaswani et al. 2017, section 3.5).

    Channels 2 i and 2 i + 1 share the angle n / 10000^(2 i / D).
    """
    with torch.inference_mode(False):  # a kept inference tensor could not serve training
        angles = _angles(tokens, width // 2)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


@lru_cache(maxsize=64)
def axes_table(grid: tuple[int, ...], width: int) -> Tensor:
    """(N, D) fp32 of a grid in row-major order: for each axis its sines, then its cosines (MAE).

    The last axis comes first, as in the released MAE, whose names of height and width are swapped.
    """
    with torch.inference_mode(False):
        part = width // (2 * len(grid))
        pieces = []
        for axis in reversed(range(len(grid))):
            angles = _angles(grid[axis], part)
            shape = [1] * len(grid) + [2 * part]
            shape[axis] = grid[axis]
            waves = torch.cat([angles.sin(), angles.cos()], dim=-1).view(shape)
            pieces.append(waves.expand(*grid, -1))
        return torch.cat(pieces, dim=-1).reshape(prod(grid), width).float()


def _angles(places: int, frequencies: int) -> Tensor:
    speed = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    return torch.arange(places, dtype=torch.float64)[:, None] * speed


class SinusoidPositions(nn.Module):
    """Adds fixed sines and cosines.

    layout: `interleaved` counts the tokens of the whole grid (Mockingjay, VideoMAE); `axes` gives
    each axis of the grid with several places an equal part of the width (MAE: two axes).
    """

    def __init__(self, width: int, layout: str = "axes", dropout: float = 0.0) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise UserError(
                f"positions.layout: {layout!r} is not known; use one of {', '.join(LAYOUTS)}"
            )
        self.width, self.layout = width, layout
        self.dropout = nn.Dropout(dropout)

    def vectors(self, grid: Sequence[int]) -> Tensor:
        """(N, D) vectors of a grid in row-major order, fp32.

        Raises:
            UserError: a width that has no equal even part for each axis.
        """
        grid = [n for n in grid if n > 1] or [1]  # an axis of one place tells nothing
        axes = len(grid) if self.layout == "axes" else 1
        if self.width % (2 * axes):
            raise UserError(
                f"positions: a width of {self.width} has no sine and cosine for each of {axes} "
                f"axes; use a multiple of {2 * axes}"
            )
        if self.layout == "axes":
            return axes_table(tuple(grid), self.width)
        return interleaved_table(prod(grid), self.width)

    def forward(self, x_PND: Tensor, grid: Sequence[int], pad_PN: Tensor | None = None) -> Tensor:
        """(P, N, D) tokens of a grid, in row-major order, with their positions added.

        pad_PN: not needed here; padding keeps whatever it holds.
        """
        out: Tensor = self.dropout(x_PND + self.vectors(grid).to(x_PND))
        return out
