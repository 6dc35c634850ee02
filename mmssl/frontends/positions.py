"""Learned positions: one table per axis of the token grid, summed (VATT, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from mmssl.types import UserError

FITS = ("interpolate", "crop")


@lru_cache(maxsize=64)
def spline_weights(size: int, target: int) -> Tensor:
    """(target, size) fp32 weights of the natural cubic spline through `size` points over [0, 1].

    Both index ranges are normalised to [0, 1], so that first and last points coincide; equal sizes
    give the identity. The natural spline is the order-3 polyharmonic spline in one dimension.
    """
    with torch.inference_mode(False):  # a kept inference tensor could not serve training
        return _natural_spline(size, target) if size > 1 else torch.ones(target, 1)


def _natural_spline(size: int, target: int) -> Tensor:
    # second derivatives M of the spline, linear in its values: A M = 6 R, zero at both ends
    eye = torch.eye(size, dtype=torch.float64)
    second = torch.zeros_like(eye)
    second[1:-1] = eye[:-2] - 2 * eye[1:-1] + eye[2:]
    system = eye.clone()
    system[1:-1] = eye[:-2] + 4 * eye[1:-1] + eye[2:]
    curve = torch.linalg.solve(system, 6 * second)
    middle = (size - 1) / 2
    places = torch.linspace(0 if target > 1 else middle, size - 1, target, dtype=torch.float64)
    left = places.floor().long().clamp(max=size - 2)
    t = (places - left)[:, None]
    straight = (1 - t) * eye[left] + t * eye[left + 1]
    bend = ((1 - t) ** 3 - (1 - t)) * curve[left] + (t**3 - t) * curve[left + 1]
    weights: Tensor = (straight + bend / 6).float()
    return weights


class FactorisedPositions(nn.Module):
    """Adds the sum of one learned table per grid axis, with optional LayerNorm and dropout.

    grid: native grid, e.g. (8, 14, 14): a video then has 8 + 14 + 14 vectors. Another grid with the
    same number of axes either interpolates each table (`fit="interpolate"`) or takes its first rows
    (`fit="crop"`, for sequences that are cut short rather than sampled more coarsely).

    norm, dropout: VATT normalises the summed vector, adds it to the token and drops out the result.
    """

    def __init__(
        self,
        grid: Sequence[int],
        width: int,
        norm: bool = False,
        dropout: float = 0.0,
        fit: str = "interpolate",
        std: float = 0.02,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if fit not in FITS:
            raise UserError(f"positions.fit: {fit!r} is not known; use one of {', '.join(FITS)}")
        self.native = tuple(grid)
        self.fit = fit
        for axis, size in enumerate(self.native):
            # no ParameterList: ZeRO-3 gathers only what a module's own forward reads of itself
            self.register_parameter(f"axis{axis}", nn.Parameter(torch.randn(size, width) * std))
        self.norm: nn.Module = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def table(self, axis: int, size: int) -> Tensor:
        """(size, D) vectors of one axis."""
        table: Tensor = getattr(self, f"axis{axis}")
        native = table.shape[0]
        if size == native:
            return table
        if self.fit == "interpolate":
            return spline_weights(native, size).to(table) @ table
        if size > native:
            raise UserError(
                f"positions: {size} places on axis {axis}, but only {native} were learned; "
                "shorten the view, enlarge the table, or use fit: interpolate"
            )
        # a view taken under no_grad still says that it needs a gradient; counting FLOPs then fails
        return table[:size].clone()

    def vectors(self, grid: Sequence[int] | None = None) -> Tensor:
        """(N, D) vectors of a grid in row-major order; None means the native grid.

        Raises:
            UserError: another number of axes, or with fit "crop" an axis longer than its table.
        """
        grid = self.native if grid is None else tuple(grid)
        if len(grid) != len(self.native):
            raise UserError(
                f"positions: grid {grid} has another number of axes than the native {self.native}"
            )
        total = self.table(0, grid[0])
        for axis, size in enumerate(grid[1:], start=1):
            total = total.unsqueeze(-2) + self.table(axis, size)
        out: Tensor = self.norm(total)
        return out.flatten(0, -2)

    def forward(self, x_PND: Tensor, grid: Sequence[int], pad_PN: Tensor | None = None) -> Tensor:
        """(P, N, D) tokens of a grid, in row-major order, with their positions added.

        pad_PN: not needed here; padding keeps whatever it holds.
        """
        out: Tensor = self.dropout(x_PND + self.vectors(grid))
        return out
