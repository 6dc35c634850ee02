"""Trunks beside the transformer: causal convolutions (wav2vec, vq-wav2vec) and none at all.

B rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.dilated import DilatedConvs
from mmssl.backbones.recurrent import Recurrent
from mmssl.backbones.transformer import Transformer
from mmssl.frontends.norms import TimeGroupNorm
from mmssl.frontends.stems import ACTIVATIONS


class CausalConv(nn.Module):
    """Convolution over the last `kernel` tokens, norm, activation; (x + that) * sqrt(0.5).

    skip: False leaves x and the factor out.
    """

    def __init__(self, width: int, kernel: int, activation: str, skip: bool) -> None:
        super().__init__()
        self.before, self.skip = kernel - 1, skip
        self.conv = nn.Conv1d(width, width, kernel)
        self.norm = TimeGroupNorm(1, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x_BND: Tensor, pad_BN: Tensor | None) -> Tensor:
        """Same shape out; the first token stands in for those before it."""
        seen_BDM = F.pad(x_BND.transpose(1, 2), (self.before, 0), mode="replicate")
        new_BDN: Tensor = self.activation(self.norm(self.conv(seen_BDM), pad_BN))
        new_BND = new_BDN.transpose(1, 2)
        return (x_BND + new_BND) * sqrt(0.5) if self.skip else new_BND


class CausalConvs(nn.Module):
    """Causal convolutions of wav2vec (2019); with skips its "large" form and vq-wav2vec (2020).

    Token t sees tokens up to t, sum(kernels - 1) + 1 of them, but for the norms, whose mean and
    variance are those of the row's valid tokens, later ones included, as published.
    """

    causal = True

    def __init__(
        self, width: int, kernels: Sequence[int], activation: str = "relu", skips: bool = True
    ) -> None:
        super().__init__()
        self.width, self.layers = width, len(kernels)
        self.blocks = nn.ModuleList(CausalConv(width, k, activation, skips) for k in kernels)

    def forward(
        self,
        x_BND: Tensor,
        pad_BN: Tensor | None = None,
        modality: str | None = None,
        return_hidden: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode; (B, N, D) and, if asked, the output of every layer, as `Transformer.forward`."""
        hidden: list[Tensor] = []
        for block in self.blocks:
            x_BND = block(x_BND, pad_BN)
            if return_hidden:
                hidden.append(x_BND)
        return x_BND, hidden


class Pointwise(nn.Module):
    """Every token by itself: as it is, or its ReLU (words of MIL-NCE and MMV, before a pooling)."""

    layers, causal = 1, True

    def __init__(self, width: int, relu: bool = True) -> None:
        super().__init__()
        self.width, self.relu = width, relu

    def forward(
        self,
        x_BND: Tensor,
        pad_BN: Tensor | None = None,
        modality: str | None = None,
        return_hidden: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `CausalConvs.forward`."""
        x_BND = x_BND.relu() if self.relu else x_BND
        return x_BND, [x_BND] if return_hidden else []


Trunk = Transformer | CausalConvs | DilatedConvs | Recurrent | Pointwise
