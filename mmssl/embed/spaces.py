"""Which spaces a model has, what lives in each, and the vectors of a batch in them.

Letters in shapes: B rows of a batch of one view, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mmssl.eval.embed import encoded_once
from mmssl.heads.embed import pool
from mmssl.model import Model, Space
from mmssl.specs import (
    CausalConvSpec,
    DilatedConvSpec,
    PositionSpec,
    RecurrentSpec,
    SegmentsSpec,
    TowerSpec,
    TransformerSpec,
    ViewSpec,
)
from mmssl.types import MODALITIES, Batch, UserError

TOWERS = "towers."  # spaces of single towers: the mean of a tower's valid tokens


class Spaces:
    """The vectors that a model makes, by modality and space.

    views: as they read a user's media, by name. view_of: the one behind each modality and space.
    """

    def __init__(self, model: Model, text: bool = True) -> None:
        """List them; text: there is a tokenizer."""
        self.model, self.name = model, model.spec.name
        views = {name: _reading(view) for name, view in model.spec.views.items()}
        # ids of a side-car cannot be made of media, nor those of a text without its tokenizer
        self.views = {
            n: v for n, v in views.items() if v.codes is None and (text or v.modality != "text")
        }
        self.view_of: dict[Space, str] = {
            key: view for key, view in model.spaces().items() if view in self.views
        }
        for name, view in self.views.items():
            self.view_of.setdefault((view.modality, TOWERS + view.tower_name), name)

    @property
    def loose(self) -> set[str]:
        """Views of sound whose towers know no length: padding tells them nothing and costs time.

        Learned positions stretch with the padded grid, and must have it as in training.
        """
        towers = self.model.spec.towers
        return {
            name
            for name, view in self.views.items()
            if view.modality == "audio" and _knows_no_length(towers[view.tower_name])
        }

    @property
    def table(self) -> dict[str, tuple[str, ...]]:
        """The modalities of every space."""
        names = dict.fromkeys(space for _, space in self.view_of)
        return {n: tuple(m for m in MODALITIES if (m, n) in self.view_of) for n in names}

    @property
    def default(self) -> str:
        """The trained space with the most modalities, the first of several; else a tower's.

        Raises:
            UserError: nothing can be encoded.
        """
        table = self.table
        if not table:
            raise UserError(f"{self.name}: reads neither sound nor pictures nor text")
        trained = [name for name in table if not name.startswith(TOWERS)]
        return max(trained or table, key=lambda name: len(table[name]))

    def named(self, space: str | None) -> str:
        """The space of a name, None being the default.

        Raises:
            UserError: there is none.
        """
        if space is not None and space not in self.table:
            raise UserError(f"space: no {space!r}; there are {self.told}")
        return space or self.default

    @property
    def told(self) -> str:
        """The table in words."""
        return ", ".join(f"{name} ({' '.join(held)})" for name, held in self.table.items())

    def keys(self, spaces: Collection[str]) -> dict[Space, str]:
        """The part of `view_of` that concerns some spaces."""
        return {key: view for key, view in self.view_of.items() if key[1] in spaces}

    def vectors(
        self, keys: Mapping[Space, str], normalize: bool, view: str, batch: Batch
    ) -> dict[str, Tensor]:
        """{space: (B, D) fp32} of a batch of one view, for those of `keys` that are made of it."""
        asked = [space for (_, space), read in keys.items() if read == view]
        found: dict[str, Tensor] = {}
        model = copy(self.model)  # what it remembers of this batch is of no use to other threads
        with encoded_once(model, batch):
            if not all(space.startswith(TOWERS) for space in asked):
                made = model.vectors(batch)
                found = {space: z_BD for (_, space), (z_BD, _) in made.items() if space in asked}
            for space in asked:
                if space.startswith(TOWERS):
                    found[space] = pool(model.passes(batch).tokens(view), "mean")
        unit = {s: F.normalize(z_BD, dim=-1) if normalize else z_BD for s, z_BD in found.items()}
        return {space: z_BD.float() for space, z_BD in unit.items()}


def _knows_no_length(tower: TowerSpec) -> bool:
    learned = isinstance(tower.positions, PositionSpec) and tower.positions.kind == "learned"
    kinds = TransformerSpec | CausalConvSpec | DilatedConvSpec | RecurrentSpec
    sequence = isinstance(tower.backbone, kinds)
    return (sequence or tower.backbone == "shared") and not learned


def _reading(view: ViewSpec) -> ViewSpec:
    """A view as it reads a user's media.

    Frames are scaled to its side whatever a random crop may have read in training; a text is one
    segment, never paired with another row's.
    """
    changes: dict[str, Any] = {"augment": [], "candidates": 1}
    if view.segments is not None:
        changes["segments"] = SegmentsSpec(pairing="single")
    return view.model_copy(update=changes)
