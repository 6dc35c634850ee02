"""Positions by convolution: relative ones that need no table and no longest length.

P items, N tokens of one axis (time), D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mmssl.types import UserError


class _Convolved(nn.Module):
    """Adds what convolutions along time make of the tokens."""

    kernel: int

    def forward(
        self, x_PND: Tensor, grid: Sequence[int] | None = None, pad_PN: Tensor | None = None
    ) -> Tensor:
        """Tokens with their positions added.

        grid: of one axis, any other of size 1; asked for only to refuse others. pad_PN: True at
        padding, which becomes zeros before any convolution sees it.

        Raises:
            UserError: a grid of several axes.
        """
        if grid is not None and prod(grid[1:]) != 1:
            raise UserError(
                f"positions: a convolution runs along one axis, the grid is {tuple(grid)}; merge "
                "the axes or use learned positions"
            )
        if pad_PN is not None:
            x_PND = x_PND.masked_fill(pad_PN[..., None], 0.0)
        return x_PND + self.vectors(x_PND, pad_PN)

    def vectors(self, x_PND: Tensor, pad_PN: Tensor | None) -> Tensor:
        """(P, N, D) what is added."""
        raise NotImplementedError

    def _convolve(self, conv: nn.Module, x_PND: Tensor) -> Tensor:
        """(P, D, N) of (P, N, D): an even kernel gives one frame more, the last, to be dropped."""
        out: Tensor = conv(x_PND.transpose(1, 2))
        return out[..., : x_PND.shape[1]]


class ConvPositions(_Convolved):
    """One wide grouped convolution and GELU (wav2vec 2.0, HuBERT, WavLM).

    Its weight is normalised with one gain per tap. The first weights are normal with deviation
    sqrt(4 / (kernel D)).
    """

    def __init__(self, width: int, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        conv = _conv(width, kernel, groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, dim=2)

    def vectors(self, x_PND: Tensor, pad_PN: Tensor | None) -> Tensor:
        """(P, N, D) what is added."""
        return F.gelu(self._convolve(self.conv, x_PND)).transpose(1, 2)


class ConvStackPositions(_Convolved):
    """Several convolutions, each with LayerNorm (without gains and biases) and GELU (data2vec)."""

    def __init__(
        self, width: int, layers: int = 5, kernel: int = 19, groups: int = 16, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.convs = nn.ModuleList(_conv(width, kernel, groups) for _ in range(layers))

    def vectors(self, x_PND: Tensor, pad_PN: Tensor | None) -> Tensor:
        """(P, N, D) what is added; padding is zeroed before every convolution."""
        for conv in self.convs:
            x_PND = self._convolve(conv, x_PND).transpose(1, 2)
            x_PND = F.gelu(F.layer_norm(x_PND, (self.width,), eps=self.eps))
            if pad_PN is not None:
                x_PND = x_PND.masked_fill(pad_PN[..., None], 0.0)
        return x_PND


class _Conv(nn.Conv1d):
    """On CPUs in float32 at any precision around it.

    oneDNN's bf16 kernel for processors with AMX gives wrong sums for some grouped convolutions
    (measured with torch 2.12: relative error 1 with 128 taps and 2 channels in a group).
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        around = torch.is_autocast_enabled("cpu")
        out: Tensor
        if x.device.type != "cpu" or not (around or x.dtype == torch.bfloat16):
            out = super()._conv_forward(x, weight, bias)
            return out
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            out = super()._conv_forward(x.float(), weight.float(), wide)
        return out.to(torch.get_autocast_dtype("cpu") if around else x.dtype)


def _conv(width: int, kernel: int, groups: int) -> nn.Conv1d:
    if width % groups:
        raise UserError(
            f"positions: a width of {width} has no {groups} equal groups; change `groups`"
        )
    return _Conv(width, width, kernel, padding=kernel // 2, groups=groups)
