"""The Conformer layer (Gulati et al. 2020), also with its convolution ahead of attention.

x + FFN/2, attention, convolution (or the other way round), x + FFN/2, LayerNorm: Srivastava et al.
2022 put the convolution first and normalise it by groups, so that no batch statistics exist.

B rows, N tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.backbones.attention import Attention
from mmssl.backbones.layers import FeedForward, LayerOptions, PerModality, linear
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.frontends.norms import TimeGroupNorm
from mmssl.types import UserError

CONV_NORMS = ("group", "batch")


@dataclass(frozen=True)
class ConvOptions:
    """The convolution of a Conformer layer.

    kernel: odd. first: before attention. norm: `group` = one mean and variance per row over all
    channels and valid steps; `batch` = per channel over the valid steps of all rows and ranks.
    bias: of its three convolutions (fairseq has none).
    """

    kernel: int = 31
    first: bool = False
    norm: str = "group"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise UserError(f"conv_kernels: {self.kernel} is even; use odd kernels")
        if self.norm not in CONV_NORMS:
            raise UserError(
                f"conv_norm: {self.norm!r} is not known; use one of {', '.join(CONV_NORMS)}"
            )


class TimeConv(nn.Module):
    """Pointwise to 2 D, gated linear unit, depthwise along time, norm, SiLU, pointwise."""

    def __init__(self, options: LayerOptions, conv: ConvOptions) -> None:
        super().__init__()
        width = options.width
        self.inward = linear(width, 2 * width, options.init, conv.bias)
        self.depthwise = nn.Conv1d(
            width, width, conv.kernel, padding=conv.kernel // 2, groups=width, bias=conv.bias
        )
        self.norm: TimeGroupNorm | MaskedSyncBatchNorm = (
            TimeGroupNorm(1, width, options.eps)
            if conv.norm == "group"
            else MaskedSyncBatchNorm(width, eps=options.eps)
        )
        self.outward = linear(width, width, options.init, conv.bias)

    def forward(self, x_BND: Tensor, pad_BN: Tensor | None = None) -> Tensor:
        """(B, N, D), same shape out; padded steps are zeros to their neighbours."""
        x = F.glu(self.inward(x_BND), dim=-1)
        if pad_BN is not None:
            x = x.masked_fill(pad_BN[..., None], 0.0)
        maps = self.depthwise(x.transpose(1, 2))
        if isinstance(self.norm, TimeGroupNorm):
            rows = self.norm(maps, pad_BN).transpose(1, 2)
        else:
            rows = self.norm(maps.transpose(1, 2), None if pad_BN is None else ~pad_BN)
        out: Tensor = self.outward(F.silu(rows))
        return out


class ConformerBlock(nn.Module):
    """One Conformer layer; the same contract as the transformer's `Block`."""

    def __init__(self, options: LayerOptions, ffn_for: Sequence[str], conv: ConvOptions) -> None:
        super().__init__()
        self.conv_first = conv.first
        self.norm1, self.ffn1 = options.norm(), PerModality(ffn_for, FeedForward, options, F.silu)
        self.norm2, self.attention = options.norm(), Attention(options)
        self.norm3, self.conv = options.norm(), TimeConv(options, conv)
        self.norm4, self.ffn2 = options.norm(), PerModality(ffn_for, FeedForward, options, F.silu)
        self.norm = options.norm()
        self.dropout = options.branch_dropout()

    def forward(
        self,
        x_BND: Tensor,
        mask: Tensor | None = None,
        modality: str | None = None,
        bias: Tensor | None = None,
        tap: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D), same shape out; arguments as in `Block`, mask (B, 1, 1, N) bool."""
        pad_BN = None if mask is None else ~mask[:, 0, 0]
        x = x_BND + 0.5 * self.dropout(self.ffn1(self.norm1(x_BND, modality), modality))
        if self.conv_first:
            x = x + self.dropout(self.conv(self.norm3(x, modality), pad_BN))
        x = x + self.dropout(self.attention(self.norm2(x, modality), mask, bias))
        if not self.conv_first:
            x = x + self.dropout(self.conv(self.norm3(x, modality), pad_BN))
        ffn = self.ffn2(self.norm4(x, modality), modality)
        out: Tensor = self.norm(x + 0.5 * self.dropout(ffn), modality)
        return (out, ffn) if tap else out
