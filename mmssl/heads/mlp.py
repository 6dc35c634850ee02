"""Multi-layer perceptrons. P rows, D input width, S output width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from mmssl.dist import MaskedSyncBatchNorm


class MLP(nn.Module):
    """Linear maps with ReLU between them.

    widths: outputs of every map. norm: `hidden`, batch norm before each ReLU (BYOL); `all`, behind
    the last map, too, there without scale and shift (SimSiam); or `none` (MoCo v2). bias: of the
    maps that no norm follows; the others have none, which a norm would take away. constant_lr: of
    the optimiser's groups.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        norm: Literal["none", "hidden", "all"] = "hidden",
        bias: bool = True,
        constant_lr: bool = False,
    ) -> None:
        super().__init__()
        self.constant_lr = constant_lr
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise([inputs, *widths])):
            last = i == len(widths) - 1
            normed = norm == "all" or (norm == "hidden" and not last)
            layers.append(nn.Linear(before, after, bias=bias and not normed))
            layers += [MaskedSyncBatchNorm(after, affine=not last)] if normed else []
            layers += [] if last else [nn.ReLU()]
        self.layers = nn.ModuleList(layers)

    def forward(self, x_PD: Tensor, valid_P: Tensor | None = None) -> Tensor:
        """(P, D) to (P, S); rows that are not valid enter no batch statistics."""
        for layer in self.layers:
            x_PD = layer(x_PD, valid_P) if isinstance(layer, MaskedSyncBatchNorm) else layer(x_PD)
        return x_PD


def mlp(width: int, widths: list[int]) -> nn.Module:
    """Linear maps of these widths with ReLU between them; nothing without any."""
    layers: list[nn.Module] = []
    for i, out in enumerate(widths):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Linear(width, out)]
        width = out
    return nn.Sequential(*layers)
