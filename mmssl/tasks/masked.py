"""`masked`: hide a part of the input, encode, predict what was hidden.

Targets are objects (`mmssl.targets`): each says what is read instead of the hidden input, what is
predicted and how far off it is; the task does not ask which one it has.
Letters: P items, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.masking import RULES
from mmssl.rng import row_uniform
from mmssl.schedules import resolve
from mmssl.specs import MaskSpec, Number
from mmssl.targets.base import Seen, Stats, Target
from mmssl.tasks.base import Task
from mmssl.towers import Mask, Passes, Tower, item_weight
from mmssl.types import Batch, Term, ViewBatch


class Masked(Task):
    """Masked prediction on one view.

    embedding: width of the vector that marks or replaces hidden tokens behind the stem; 0 where the
    target alters the input itself. weights: of the target's terms, its own unless given. begins:
    bool of every id, it begins a word; for the rule `ngrams`.
    """

    begins_V: Tensor | None

    def __init__(
        self,
        name: str,
        view: str,
        target: Target,
        mask: MaskSpec,
        embedding: int,
        rows: float,
        weight: Number,
        weights: Mapping[str, Number],
        begins: Tensor | None = None,
    ) -> None:
        super().__init__(weight)
        self.name, self.view, self.mask, self.rows = name, view, mask, rows
        self.weights = {**target.weights, **weights}
        self.embedding = nn.Parameter(torch.randn(embedding) * 0.02) if embedding else None
        self.target, self.floors = target, target.floors
        self.register_buffer("begins_V", begins, persistent=False)  # the tokenizer is kept anyway

    def weight(self, term: str) -> list[Number]:
        """The task's weight and the term's own."""
        return [self._weight, self.weights.get(term, 1.0)]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The target's terms over the hidden tokens."""
        terms: dict[str, Term] = self.target(self._seen(passes, batch))
        self.last = self.target.last
        return terms

    def stats(self, passes: Passes, batch: Batch) -> Stats:
        """Sums for evaluation."""
        return self.target.stats(self._seen(passes, batch))

    def after_step(self, position: float) -> None:
        """Let the target update its buffers."""
        self.target.after_step(position)

    def _seen(self, passes: Passes, batch: Batch) -> Seen:
        tower = passes.tower(self.view)
        assert isinstance(tower, Tower)  # `build` refuses other towers
        view = self._rows(batch.views[self.view]) if self.training else batch.views[self.view]
        hidden = self._hidden(tower, view, passes.position)
        altered = self.target.altered(tower, view, hidden)
        mask = Mask(self.name, hidden, self.mask.hide, self.embedding, altered)
        tokens = passes.tokens(self.view, mask, view)
        seen = hidden & (item_weight(view) > 0)[:, None]
        return Seen(self.name, tower, view, tokens, seen, altered, passes)

    def _rows(self, view: ViewBatch) -> ViewBatch:
        """The items that take part in this step, chosen by their own seeds."""
        if self.rows == 1.0:
            return view
        return keep_items(view, row_uniform(view.seeds_P, 1, f"{self.name}/rows")[:, 0] < self.rows)

    def _hidden(self, tower: Tower, view: ViewBatch, position: float) -> Tensor:
        grid = tower.grid_of(view.data.shape[1:])
        pad = tower.padding(view, grid)
        valid = self.target.candidates(view)
        if pad is not None:
            valid = ~pad if valid is None else valid & ~pad
        options = _mask_options(self.mask, position)
        if self.begins_V is not None:
            options["begins_PN"] = self.begins_V[view.data]
        rule = RULES[self.mask.rule]
        return rule(view.seeds_P, grid, valid_PN=valid, stream=self.name, **options)


def _mask_options(spec: MaskSpec, position: float) -> dict[str, Any]:
    """The constants that a rule takes."""
    if spec.rule == "all":
        return {}
    if spec.rule == "spans":
        return {
            "start_prob": spec.start_prob,
            "length": spec.length,
            "min_spans": spec.min_spans,
        }
    ratio = {"ratio": resolve(spec.ratio, position)}
    if spec.rule == "blocks":
        return {**ratio, "block": spec.block, "inverse": spec.inverse}
    if spec.rule == "beit_blocks":
        return {**ratio, "smallest": spec.smallest}
    if spec.rule == "words":
        return {**ratio, "replacement": spec.replacement}
    if spec.rule == "ngrams":
        return {**ratio, "longest": spec.longest}
    return ratio


def keep_items(view: ViewBatch, keep_P: Tensor) -> ViewBatch:
    """The marked items of a view; its first item as a dummy when none is marked."""
    keep_P = keep_P & (item_weight(view) > 0)
    dummy = not bool(keep_P.any())
    index = (
        torch.zeros(1, dtype=torch.long, device=keep_P.device) if dummy else keep_P.nonzero()[:, 0]
    )
    present = torch.zeros_like(view.present_BL)
    if not dummy:
        present[view.rows_P[index], view.slots_P[index]] = True
    columns: dict[str, Any] = {name: column[index] for name, column in view.columns().items()}
    labels = {name: replace(kept, ids=kept.ids[index]) for name, kept in view.labels.items()}
    return replace(view, **columns, labels=labels, present_BL=present, dummy=dummy)
