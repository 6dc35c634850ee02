"""Dropout of activations and of whole residual branches.

B rows, D width; `...` any axes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 1 << 16  # a draw of 16 bits decides one number


class Dropout(nn.Module):
    """Zeros numbers with probability `rate` in training and scales the others by 1 / (1 - rate).

    On a CPU 16 random bits decide on a number instead of torch's Bernoulli draws: half of the time,
    and one byte of memory per number until the backward pass instead of four. The rate is then
    rounded to a multiple of 2^-16 (and the scale belongs to the rounded rate, so the mean is kept).
    On other devices torch's kernel serves.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        """Rate."""
        return str(self.rate)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, same shape out."""
        if not self.training or self.rate == 0.0:
            return x
        if x.device.type == "cpu":
            return cast("Tensor", _BitDropout.apply(x, self.rate))  # type: ignore[no-untyped-call]
        out: Tensor = F.dropout(x, self.rate, training=True)
        return out


class _BitDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        dropped = round(rate * _STEPS)
        ctx.scale = _STEPS / (_STEPS - dropped)
        keep = _random_16(x.numel()).view(x.shape) >= dropped - _STEPS // 2
        ctx.save_for_backward(keep)
        return _scaled(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _scaled(grad, keep, ctx.scale), None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    # in place from the mask on: allocating another result takes as long as computing it
    return keep.to(x.dtype).mul_(scale).mul_(x)


def _random_16(count: int) -> Tensor:
    """(count,) int16, uniform over all 2^16 values, from torch's global CPU generator."""
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits: Tensor = words.view(torch.int16)[:count]
    return bits


class DropPath(nn.Module):
    """Leaves out a residual branch, per row, with probability `rate` (Huang et al. 2016).

    Kept rows are scaled by 1 / (1 - rate); in evaluation nothing happens.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        """Rate."""
        return str(self.rate)

    def forward(self, branch_BND: Tensor) -> Tensor:
        """(B, ...), same shape out."""
        if not self.training or self.rate == 0.0:
            return branch_BND
        rows = (branch_BND.shape[0],) + (1,) * (branch_BND.ndim - 1)
        keep = torch.rand(rows, device=branch_BND.device) >= self.rate
        return branch_BND * keep.to(branch_BND.dtype) / (1.0 - self.rate)
