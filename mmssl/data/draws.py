"""Batches without views, for tasks that hold their data themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmssl.types import Batch


class Draws:
    """Rows that are only numbered, endlessly; the ranks take turns.

    rows: of one micro-batch of this rank.
    """

    def __init__(self, rows: int, rank: int, world: int) -> None:
        self.rows, self.rank, self.world, self.position = rows, rank, world, 0
        self.skipped: dict[str, int] = {}

    def __next__(self) -> Batch:
        """The next micro-batch, of equal rows however many ranks share it."""
        first = (self.position * self.world + self.rank) * self.rows
        self.position += 1
        index_B = torch.arange(first, first + self.rows)
        keys = [str(i) for i in index_B.tolist()]
        return Batch({}, keys, index_B, torch.zeros_like(index_B), index_B)

    def state(self) -> int:
        """How many micro-batches were drawn."""
        return self.position

    def restore(self, state: int) -> None:
        """Go on behind so many."""
        self.position = state

    def redistribute(self, states: Sequence[int]) -> None:
        """Go on with another number of ranks, whose micro-batches are as large in total."""
        self.position = states[0]

    def close(self) -> None:
        """There is nothing to stop."""
