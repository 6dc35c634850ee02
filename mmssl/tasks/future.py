"""`future`: from a context that has not seen them, predict tokens further on.

Targets are objects (`mmssl.targets.later`): each owns its heads and says what is predicted and how
far off it is; the task aligns contexts with what lies ahead of them.
Letters: P items, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmssl.specs import Number
from mmssl.targets.later import Heard, LaterTarget
from mmssl.tasks.base import Task
from mmssl.towers import Passes, item_weight
from mmssl.types import Batch, Term, UserError


class Future(Task):
    """Prediction on one view, whose tower must be causal.

    predicts: the view whose tokens are predicted, as many as the other has. steps: how many tokens
    ahead each head predicts. weights: of the target's terms, its own unless given.
    """

    def __init__(
        self,
        name: str,
        view: str,
        predicts: str,
        target: LaterTarget[Any],
        steps: Sequence[int],
        weight: Number,
        weights: Mapping[str, Number],
    ) -> None:
        super().__init__(weight)
        self.name, self.view, self.predicts = name, view, predicts
        self.target, self.steps = target, tuple(steps)
        self.weights, self.floors = {**target.weights, **weights}, target.floors

    def weight(self, term: str) -> list[Number]:
        """The task's weight and the term's own."""
        return [self._weight, self.weights.get(term, 1.0)]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The target's terms, each summed over the steps that the view is long enough for.

        Raises:
            UserError: it is too short for any.
        """
        tokens = passes.tokens(self.view)
        valid_PN = ~tokens.pad_PN & (item_weight(tokens.view) > 0)[:, None]
        heard = Heard(self.name, self.view, self.predicts, tokens, valid_PN, passes)
        truth = self.target.truth(heard)
        x_PND = truth.context_PND
        terms: dict[str, Term] = {}
        for step, ahead in enumerate(k for k in self.steps if k < x_PND.shape[1]):
            for name, term in self.target(x_PND[:, :-ahead], truth, step, ahead).items():
                last = terms.get(name, Term(term.sum * 0, term.count * 0))
                terms[name] = Term(last.sum + term.sum, last.count + term.count)
        if not terms:
            raise UserError(
                f"tasks.{self.name}: {x_PND.shape[1]} tokens of views.{self.view}, the first "
                f"prediction is {self.steps[0]} ahead; use a longer view"
            )
        return terms | self.target.aside(truth)
