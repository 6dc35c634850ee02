"""Captions to token ids: (N,) int64 with the end marker, at most `length` ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """The part of a tokenizer that views need."""

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of a text, the last of them the end marker."""
        ...


def tokenise(
    captions: Sequence[str], tokenizer: Encoder, length: int, candidates: int
) -> list[Tensor]:
    """Ids of the first `candidates` captions; fewer where the clip has fewer."""
    chosen = captions[:candidates]
    return [torch.tensor(tokenizer.encode(text, length), dtype=torch.int64) for text in chosen]
