"""What every task has in common."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmssl.specs import Number
from mmssl.towers import Passes
from mmssl.types import Batch, Floor, Term


class Task(nn.Module):
    """One loss, or several with shared heads, over encoded views.

    A task owns its heads, targets and learnable scalars. `forward` returns terms by name; the model
    multiplies each by `weight(name)` and divides by counts summed over ranks.

    floors: watched terms that tell a collapse. last: vectors (rows, D) of the last step, without
    gradient, whose rank and spread are watched.
    """

    floors: Mapping[str, Floor] = {}
    last: Mapping[str, Tensor]

    def __init__(self, weight: Number) -> None:
        super().__init__()
        self._weight = weight
        self.last = {}

    def weight(self, term: str) -> list[Number]:
        """Factors of a term's weight."""
        return [self._weight]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """Terms of the local rows."""
        raise NotImplementedError

    def after_step(self, position: float) -> None:
        """Update own buffers after an optimiser step; nothing by default."""
