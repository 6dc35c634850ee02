"""Memories of rows that earlier steps made, kept as buffers. G rows of all ranks, K entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl import dist


class Fifo(nn.Module):
    """The newest K rows of all ranks, the same on every rank (MoCo's queue, BYOL-A's inputs).

    rows_K: (K, ...) entries. source_K: int64 recording of each, -1 where there is none.
    filled: (1,) entries that have been written. next: (1,) where the next row goes.

    Rows are offered during a forward and written after the optimiser step: losses of all
    micro-batches see the same entries, and a step that is left out leaves no trace.
    """

    rows_K: Tensor
    source_K: Tensor
    filled: Tensor
    next: Tensor

    def __init__(self, size: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("rows_K", torch.zeros(size, *shape))
        self.register_buffer("source_K", torch.full((size,), -1))
        self.register_buffer("filled", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(1, dtype=torch.int64))
        self._offered: list[tuple[Tensor, Tensor, Tensor]] = []
        self._position = -1.0

    @torch.no_grad()
    def offer(self, rows_B: Tensor, source_B: Tensor, valid_B: Tensor, position: float) -> None:
        """Rows of this rank that are to be written; B is the same on every rank.

        position: of the step; what was offered at another one and not written is forgotten.
        """
        if position != self._position:
            self._offered, self._position = [], position
        parts = (rows_B.to(self.rows_K.dtype), source_B, valid_B)
        rows, source, valid = (dist.gather_no_grad(x) for x in parts)
        self._offered.append((rows, source, valid))

    @torch.no_grad()
    def write(self) -> None:
        """Let the offered rows take the place of the oldest; rows that are not finite stay out."""
        for rows, source, valid in self._offered:
            kept = valid & rows.flatten(1).isfinite().all(1)
            size = len(self.rows_K)
            rows, source = rows[kept][-size:], source[kept][-size:]
            place = (self.next + torch.arange(len(rows), device=rows.device)) % size
            self.rows_K[place], self.source_K[place] = rows, source
            self.next.copy_((self.next + len(rows)) % size)
            self.filled.copy_((self.filled + len(rows)).clamp(max=size))
        self._offered = []
