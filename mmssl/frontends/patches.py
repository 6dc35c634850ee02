"""Signals to token grids by non-overlapping linear patches; masks of valid lengths.

P items, C channels, N tokens, D width, K numbers in one patch. A signal is (P, C, *axes): (P, 1, S)
for a waveform, (P, 1, T, F) for a spectrogram, (P, 3, T, H, W) for video. Tokens come in row-major
order of the grid. Lengths count valid inputs along the first axis (time).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.frontends.lengths import Field, patch_grid
from mmssl.types import UserError

Grid = tuple[int, ...]


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut (P, C, *axes) into (P, N, K) patches, K = C * prod(patch) in the order (C, *patch).

    Valid padding: what does not fill a patch at the far ends is dropped.

    Raises:
        UserError: an input smaller than one patch or with another number of axes.
    """
    grid = patch_grid(x.shape[2:], patch)
    for axis, (count, size) in enumerate(zip(grid, patch, strict=True), start=2):
        x = x.narrow(axis, 0, count * size)
    pairs = [n for pair in zip(grid, patch, strict=True) for n in pair]
    cells = x.reshape(*x.shape[:2], *pairs)
    axes = range(len(patch))
    order = [0, *(2 + 2 * i for i in axes), 1, *(3 + 2 * i for i in axes)]
    return cells.permute(order).reshape(x.shape[0], prod(grid), -1)


def cells_of(signal: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
    """(P, N, K): the input cells under the tokens of a grid, cut or zero-filled to whole cells."""
    fill: list[int] = []
    for size, count, step in zip(
        reversed(signal.shape[2:]), reversed(grid), reversed(cell), strict=True
    ):
        fill += [0, count * step - size]
    return patchify(F.pad(signal, fill), cell)


def unpatchify(x_PNK: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Inverse of `patchify`: (P, N, K) to (P, C, *axes) with axes = grid * patch."""
    rank = len(patch)
    cells = x_PNK.reshape(x_PNK.shape[0], *grid, -1, *patch)
    order = [0, rank + 1]
    for i in range(rank):
        order += [1 + i, rank + 2 + i]
    axes = [count * size for count, size in zip(grid, patch, strict=True)]
    return cells.permute(order).reshape(x_PNK.shape[0], -1, *axes)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Type of a module's weights, also where they are buffers (`mmssl.targets.teacher`)."""
    return next(chain(module.parameters(), module.buffers())).dtype


def zero_behind(x: Tensor, lengths_P: Tensor | None, axis: int = 2) -> Tensor:
    """`x` with zeros at and after each item's length along `axis`; None changes nothing."""
    if lengths_P is None:
        return x
    behind = torch.arange(x.shape[axis], device=x.device) >= lengths_P[:, None]
    shape = [1] * x.ndim
    shape[0], shape[axis] = behind.shape
    return x.masked_fill(behind.view(shape), 0.0)


def stack_lengths(
    lengths_P: Tensor, kernels: Sequence[int], strides: Sequence[int], paddings: Sequence[int]
) -> Tensor:
    """`lengths.stack_length` of every item, but at least 1 where the input has any, else 0."""
    out = lengths_P
    for kernel, stride, padding in zip(kernels, strides, paddings, strict=True):
        span = out + 2 * padding - kernel
        out = (torch.div(span, stride, rounding_mode="floor") + 1).clamp(min=0)
    return out.clamp(min=1) * (lengths_P > 0)


def padding_mask(lengths_P: Tensor, grid: Sequence[int]) -> Tensor:
    """(P, N) bool, True at tokens whose step on the grid's first axis is not below the length."""
    behind = torch.arange(grid[0], device=lengths_P.device) >= lengths_P[:, None]
    return behind.repeat_interleave(prod(grid[1:]), dim=1)


class PatchEmbed(nn.Module):
    """Linear map of non-overlapping patches to the model width (VATT, section 3.1).

    patch: one length per axis: (samples,) of a waveform, (t, f) of a spectrogram, (t, h, w) of
    video. project: False gives the patches themselves (APC), K of which must be the width.
    """

    def __init__(
        self, patch: Sequence[int], width: int, channels: int = 1, project: bool = True
    ) -> None:
        super().__init__()
        self.patch = tuple(patch)
        size = channels * prod(self.patch)
        if not project and size != width:
            raise UserError(
                f"patches: {size} numbers without a projection for a backbone that reads {width}; "
                "make them equal, or set project: true"
            )
        self.proj = nn.Linear(size, width) if project else nn.Identity()

    @property
    def strides(self) -> Grid:
        """Inputs per token along each axis."""
        return self.patch

    def grid(self, shape: Sequence[int]) -> Grid:
        """Token grid of an input whose axes (without P and C) are `shape`."""
        return patch_grid(shape, self.patch)

    def fields(self) -> tuple[Field, ...]:
        """Stride, receptive field and first centre along each axis."""
        return tuple(Field(size, size, (size - 1) / 2) for size in self.patch)

    def out_lengths(self, lengths_P: Tensor) -> Tensor:
        """Valid tokens along the first axis; a patch begun counts, its rest is zeros."""
        return torch.div(lengths_P + self.patch[0] - 1, self.patch[0], rounding_mode="floor")

    def forward(self, x: Tensor, lengths_P: Tensor | None = None) -> tuple[Tensor, Grid]:
        """(P, C, *axes) to tokens (P, N, D) and their grid; inputs behind a length are zero."""
        if isinstance(self.proj, nn.Linear):
            x = x.to(self.proj.weight.dtype)
        x = zero_behind(x, lengths_P)
        tokens: Tensor = self.proj(patchify(x, self.patch))
        return tokens, self.grid(x.shape[2:])
