"""The encoded views of one step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmssl.chunks import in_chunks
from mmssl.towers.conv import ConvTower
from mmssl.towers.joint import JointTower
from mmssl.towers.masks import Mask
from mmssl.towers.tower import Tower
from mmssl.types import Batch, Tokens, ViewBatch

AnyTower = Tower | ConvTower


class Passes:
    """The encoded views of one step: a (tower, view, mask) triple is encoded at most once."""

    def __init__(
        self,
        towers: Mapping[str, AnyTower],
        joints: Mapping[str, JointTower],
        tower_of: Mapping[str, str],
        batch: Batch,
        position: float,
        chunk: int = 0,
    ) -> None:
        self.towers, self.joints, self.tower_of = towers, joints, tower_of
        self.batch, self.position, self.chunk = batch, position, chunk
        self._done: dict[tuple[str, str], Tokens] = {}
        self.vectors: dict[tuple[int, str, str], Tensor] = {}  # kept for tasks that share a space

    def token_count(self) -> int:
        """Tokens encoded so far, padding included."""
        return sum(t.pad_PN.numel() for t in self._done.values())

    def tower(self, view: str) -> AnyTower:
        """The tower that reads a view."""
        return self.towers[self.tower_of[view]]

    def tokens(
        self, view: str, mask: Mask | None = None, source: ViewBatch | None = None, name: str = ""
    ) -> Tokens:
        """Tokens of a view; `source` stands in for the view, e.g. with a part of its items.

        name: distinguishes passes of one view without a mask.
        """
        key = (view, name if mask is None else mask.name)
        if key not in self._done:
            data = self.batch.views[view] if source is None else source
            tower = self.tower(view)
            self._done[key] = in_chunks(
                lambda part, mask: tower.encode(part, self.position, mask), data, mask, self.chunk
            )
        return self._done[key]
