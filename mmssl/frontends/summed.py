"""Token, place and segment vectors, summed and normed: BERT's input, and what is tied to it.

P items, N tokens, D width of the backbone, E width of the tables, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.frontends.positions import FactorisedPositions

_STD = 0.02


class TokenTable(nn.Embedding):
    """Token vectors; the same matrix scores them in a tied decoder.

    One forward does both: ZeRO-3 gathers a parameter for the forward of its own module only.
    """

    def forward(self, input: Tensor, decode: bool = False) -> Tensor:
        """Ids (...) to vectors (..., E), or with `decode` vectors (..., E) to logits (..., V)."""
        return F.linear(input, self.weight) if decode else super().forward(input)


class EmbeddingTables(nn.Module):
    """Sum of token, place and segment vectors, LayerNorm, dropout (Devlin et al. 2019).

    places: learned positions; longer rows are refused. segments: kinds of segments (2 for pairs);
    0 = none. norm: with LayerNorm and dropout, else the bare sum.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        places: int = 512,
        segments: int = 0,
        norm: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.table = TokenTable(vocabulary, width)
        nn.init.normal_(self.table.weight, std=_STD)
        self.positions = FactorisedPositions([places], width, fit="crop", std=_STD)
        self.segments: nn.Embedding | None = None
        if segments:
            self.segments = nn.Embedding(segments, width)
            nn.init.normal_(self.segments.weight, std=_STD)
        self.norm = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_PN: Tensor, split_P: Tensor | None = None) -> Tensor:
        """(P, N, E). split_P: where the second segment of an item begins, 0 without one."""
        x_PNE: Tensor = self.positions(self.table(ids_PN), (ids_PN.shape[1],))
        if self.segments is not None:
            x_PNE = x_PNE + self.segments(second_segment(ids_PN, split_P).long())
        out: Tensor = self.dropout(self.norm(x_PNE))
        return out


def second_segment(ids_PN: Tensor, split_P: Tensor | None) -> Tensor:
    """(P, N) bool: the token lies in the second segment, which reaches to the end of the row."""
    if split_P is None:
        return torch.zeros_like(ids_PN, dtype=torch.bool)
    place_N = torch.arange(ids_PN.shape[1], device=ids_PN.device)
    return (place_N >= split_P[:, None]) & (split_P[:, None] > 0)


class SummedEmbedding(nn.Module):
    """Tables and, where they are narrower than the backbone, a linear map (ALBERT: E 128 to H).

    borrowed: the tables belong to another tower, whose vectors this one shares (ELECTRA).
    """

    strides = (1,)

    def __init__(self, tables: EmbeddingTables, width: int, borrowed: bool = False) -> None:
        super().__init__()
        self.own = None if borrowed else tables
        self._tables = (tables,)  # a tuple hides borrowed tables from this module's parameters
        self.proj: nn.Linear | None = None
        if tables.width != width:
            self.proj = nn.Linear(tables.width, width)
            nn.init.normal_(self.proj.weight, std=_STD)
            nn.init.zeros_(self.proj.bias)

    @property
    def tables(self) -> EmbeddingTables:
        """The tables, borrowed or not."""
        return self._tables[0]

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(N,) of N ids."""
        return tuple(shape)

    def forward(
        self, ids_PN: Tensor, split_P: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(P, N, D) and the grid; split_P as in `EmbeddingTables`."""
        x_PNE = self.tables(ids_PN, split_P)
        x_PND: Tensor = x_PNE if self.proj is None else self.proj(x_PNE)
        return x_PND, (ids_PN.shape[1],)
