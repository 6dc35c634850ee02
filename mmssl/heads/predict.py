"""What masked and future tasks read their predictions with.

P items, N tokens, D width of the tower, E width of the decoder, K numbers predicted per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.transformer import Transformer
from mmssl.types import Tokens


def layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """A linear map, behind one GELU layer of width `hidden` unless that is 0."""
    first = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
    return nn.Sequential(*first, nn.Linear(hidden or width, out))


class TokenHead(nn.Module):
    """Linear map of every token, behind one GELU layer of width `hidden` unless that is 0."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = layers(width, hidden, out)

    def forward(self, tokens: Tokens, hidden_PN: Tensor) -> Tensor:
        """(P, N, K)."""
        out: Tensor = self.layers(tokens.x_PND)
        return out


class StepHeads(nn.Module):
    """A linear map for each of several steps, with a bias that all share: h_k(c) = W_k c + b.

    wav2vec (Schneider et al. 2019) writes it as a transposed convolution, whose first values it
    has: uniform within 1 / sqrt(steps * K). bias: False leaves b out (CPC).
    """

    def __init__(self, width: int, out: int, steps: int, bias: bool = True) -> None:
        super().__init__()
        self.weight_SKD = nn.Parameter(torch.empty(steps, out, width))
        self.bias_K = nn.Parameter(torch.empty(out)) if bias else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -((steps * out) ** -0.5), (steps * out) ** -0.5)

    def forward(self, x_PND: Tensor, step: int) -> Tensor:
        """(P, N, K) of the step of that number, from 0 on."""
        return F.linear(x_PND, self.weight_SKD[step], self.bias_K)


class PatchDecoder(nn.Module):
    """A small transformer over visible tokens and mask tokens (MAE, He et al. 2022).

    Visible tokens are mapped to the decoder's width, a learned vector stands for the hidden ones,
    and all get the decoder's positions. The tower's global tokens come along, without a position.
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
        globals_PGD = [x_PD.unsqueeze(1) for x_PD in tokens.extra.values()]
        front = len(globals_PGD)
        x_PME = self.enter(torch.cat([*globals_PGD, tokens.x_PND], dim=1))
        x_PNE = torch.where(hidden_PN[..., None], self.mask_E.to(x_PME.dtype), x_PME[:, front:])
        x_PNE = self.positions(x_PNE, tokens.grid)
        pad_PM = F.pad(tokens.pad_PN & ~hidden_PN, (front, 0))
        x_PME, _ = self.trunk(torch.cat([x_PME[:, :front], x_PNE], dim=1), pad_PM)
        out: Tensor = self.head(x_PME[:, front:])
        return out
