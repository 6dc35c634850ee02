"""What ids and sentences are predicted with.

P items, N tokens, H hidden tokens, D width, E width of the embedding, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.backbones.layers import linear
from mmssl.frontends.summed import EmbeddingTables
from mmssl.heads.predict import layers


class IdHead(nn.Module):
    """Linear map to the vocabulary, behind one GELU layer of width `hidden` unless that is 0."""

    def __init__(self, width: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.layers = layers(width, hidden, vocabulary)

    def forward(self, x_HD: Tensor) -> Tensor:
        """(..., D) to logits (..., V)."""
        out: Tensor = self.layers(x_HD)
        return out


class TiedHead(nn.Module):
    """Linear to E, GELU, LayerNorm, then the token table itself and a bias (Devlin et al. 2019)."""

    def __init__(self, width: int, tables: EmbeddingTables) -> None:
        super().__init__()
        self._tables = (tables,)  # a tuple hides the stem's tables from this module's parameters
        self.dense = linear(width, tables.width, "normal")
        self.norm = nn.LayerNorm(tables.width, eps=tables.eps)
        self.bias_V = nn.Parameter(torch.zeros(tables.table.num_embeddings))

    def forward(self, x_HD: Tensor) -> Tensor:
        """(..., D) to logits (..., V)."""
        x_HE = self.norm(F.gelu(self.dense(x_HD)))
        logits: Tensor = self._tables[0].table(x_HE, decode=True)
        return logits + self.bias_V


class SentenceHead(nn.Module):
    """Two logits from the first token ([CLS]): Linear, tanh, Linear (BERT, ALBERT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pooler = linear(width, width, "normal")
        self.out = linear(width, 2, "normal")

    def forward(self, x_PND: Tensor) -> Tensor:
        """(P, N, D) to (P, 2)."""
        out: Tensor = self.out(torch.tanh(self.pooler(x_PND[:, 0])))
        return out
