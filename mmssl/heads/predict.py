"""What a masked task reads its predictions with.

P items, N tokens, D width of the tower, E width of the decoder, K numbers predicted per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl.backbones.transformer import Transformer
from mmssl.types import Tokens


class TokenHead(nn.Module):
    """Linear map of every token, behind one GELU layer of width `hidden` unless that is 0."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or width, out))

    def forward(self, tokens: Tokens, hidden_PN: Tensor) -> Tensor:
        """(P, N, K)."""
        out: Tensor = self.layers(tokens.x_PND)
        return out


class PatchDecoder(nn.Module):
    """A small transformer over visible tokens and mask tokens (MAE, He et al. 2022).

    Visible tokens are mapped to the decoder's width, a learned vector stands for the hidden ones,
    and all get the decoder's positions.
    """

    def __init__(self, width: int, positions: nn.Module, trunk: Transformer, out: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, trunk.width)
        self.mask_E = nn.Parameter(torch.randn(trunk.width) * 0.02)
        self.positions, self.trunk = positions, trunk
        self.head = nn.Linear(trunk.width, out)

    def forward(self, tokens: Tokens, hidden_PN: Tensor) -> Tensor:
        """(P, N, K). hidden_PN: tokens that the encoder did not see and the decoder predicts.

        What is neither visible nor hidden is padding.
        """
        x_PNE = self.enter(tokens.x_PND)
        x_PNE = torch.where(hidden_PN[..., None], self.mask_E.to(x_PNE.dtype), x_PNE)
        x_PNE = self.positions(x_PNE, tokens.grid)
        x_PNE, _ = self.trunk(x_PNE, tokens.pad_PN & ~hidden_PN)
        out: Tensor = self.head(x_PNE)
        return out
