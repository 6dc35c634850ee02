"""Token ids to vectors.

P items, N tokens, D width, V vocabulary, E width of a frozen table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl.types import UserError


class _Ids(nn.Module):
    """What reads one token per id."""

    strides = (1,)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(N,) of N ids."""
        return tuple(shape)


class TextEmbedding(_Ids):
    """Trainable embedding table, (P, N) ids to (P, N, D)."""

    def __init__(self, vocabulary: int, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, ids_PN: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Look the ids up."""
        vectors: Tensor = self.table(ids_PN)
        return vectors, (ids_PN.shape[1],)


class FrozenTextEmbedding(_Ids):
    """Frozen table of E-wide vectors and a trainable linear map (VATT's released configuration).

    table_VE: the word vectors, e.g. word2vec (65536, 300); without it a fixed standard-normal table
    is drawn from `generator`. The table is a persistent buffer, so that a checkpoint is complete by
    itself.
    """

    table: Tensor

    def __init__(
        self,
        vocabulary: int,
        width: int,
        table_width: int = 300,
        table_VE: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if table_VE is None:
            table_VE = torch.randn(vocabulary, table_width, generator=generator)
        if tuple(table_VE.shape) != (vocabulary, table_width):
            raise UserError(
                f"text table: {tuple(table_VE.shape)} given, vocabulary and table_width ask for "
                f"{(vocabulary, table_width)}"
            )
        self.register_buffer("table", table_VE.detach().clone().float())
        self.proj = nn.Linear(table_width, width)

    def forward(self, ids_PN: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Look the ids up and project them."""
        vectors: Tensor = self.proj(self.table[ids_PN].to(self.proj.weight.dtype))
        return vectors, (ids_PN.shape[1],)
