"""`classify`: predict a label.

`Match` asks whether two views belong together (audio-visual correspondence, L3-Net and AVE-Net);
`Label` reads a field of the samples' metadata. Letters: B rows of this rank, G rows of all ranks,
R scored pairs, D width, T time steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl import dist
from mmssl.heads.dense import MapScore
from mmssl.heads.embed import pool
from mmssl.heads.match import MapMatch, MatchScore, Parts, SpaceReader, VectorMatch
from mmssl.heads.project import Head
from mmssl.objectives.classification import binary_cross_entropy, softmax_cross_entropy
from mmssl.objectives.negatives import coin, hardest, mix_hard
from mmssl.schedules import resolve
from mmssl.specs import LabelSpec, MatchSpec, Number
from mmssl.tasks.base import Impostors, Task, gathered, row_seeds
from mmssl.towers import Passes, spread
from mmssl.types import Batch, Term


class Match(Task):
    """Correspondence: own partner against the partner of another source."""

    def __init__(
        self,
        name: str,
        spec: MatchSpec,
        score: MatchScore,
        weight: Number,
        similar: SpaceReader | None = None,
    ) -> None:
        super().__init__(weight)
        self.name, self.spec, self.score, self.similar = name, spec, score, similar

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """One term: cross-entropy over the true and the false pairs that were drawn."""
        first, second = self.spec.between
        a, b = self._read(passes, first), self._read(passes, second)
        everyone = gathered(b)
        seeds = row_seeds(batch, first)
        both = batch.views[first].present_B & batch.views[second].present_B
        index, found = self._partners(passes, batch, (a, everyone), seeds, both)
        false = tuple(part[index] for part in everyone)
        own = coin(seeds, 0.5, f"{self.name}/coin") if self.spec.draw == "coin" else None
        pairs = [(b, True, both if own is None else both & own)]
        pairs += [(false, False, found if own is None else found & ~own)]
        if self.spec.shifted:
            shifted = self.score.read(passes, self.spec.shifted, second)
            pairs += [(shifted, False, both & batch.views[self.spec.shifted].present_B)]
        terms = [self._term(passes, a, other, truth, rows) for other, truth, rows in pairs]
        return {
            "": Term(
                sum((t.sum for t in terms), a[0].new_zeros(())),
                sum((t.count for t in terms), both.new_zeros((), dtype=torch.long)),
            )
        }

    def logits(self, passes: Passes, batch: Batch, partner_B: Tensor) -> Tensor:
        """(B,) logit of row i's first view with row partner[i]'s second view."""
        first, second = self.spec.between
        b = self._read(passes, second)
        out: Tensor = self.score(passes, self._read(passes, first), tuple(p[partner_B] for p in b))
        return out

    def maps(self) -> list[tuple[MapScore, tuple[str, str]]]:
        """The map score and its views, if the match is read from one."""
        return [(self.score.score, self.spec.between)] if isinstance(self.score, MapMatch) else []

    def _read(self, passes: Passes, view: str) -> Parts:
        return self.score.read(passes, view, view)

    def _term(self, passes: Passes, a: Parts, b: Parts, truth: bool, rows_B: Tensor) -> Term:
        logits = self.score(passes, a, b)
        target = torch.full_like(logits, float(truth))
        return Term(binary_cross_entropy(logits, target, rows_B).sum(), rows_B.sum())

    def _partners(
        self,
        passes: Passes,
        batch: Batch,
        parts: tuple[Parts, Parts],
        seeds: Tensor,
        both: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(B,) place in the gathered batch of each row's false partner, and whether it has one."""
        others = Impostors(batch, self.spec.between[0], both)
        easy = others.draw(f"{self.name}/partner")
        share = resolve(self.spec.hard, passes.position)
        if share == 0:
            return easy
        other = (batch.source_B[:, None] != others.source_G) & both[:, None] & others.both_G
        with torch.no_grad():
            scores = self._similarity(passes, *parts)
        index, found, _ = mix_hard(easy, hardest(scores, other), seeds, share, f"{self.name}/hard")
        return index, found

    def _similarity(self, passes: Passes, a: Parts, everyone: Parts) -> Tensor:
        """(B, G) how alike rows are, to find hard negatives."""
        if self.similar is not None:
            read = (self.similar(passes, view, view)[0] for view in self.spec.between)
            own, theirs = (F.normalize(vectors, dim=-1) for vectors in read)
            return own @ dist.gather_no_grad(theirs).T
        assert isinstance(self.score, VectorMatch)  # a joint score needs `similar`
        table: Tensor = self.score.score(a[0], everyone[0])
        return table


class Label(Task):
    """Cross-entropy on a metadata field; rows without a listed value are left out."""

    def __init__(
        self,
        spec: LabelSpec,
        width: int,
        how: str,
        weight: Number,
        reader: SpaceReader | None = None,
    ) -> None:
        super().__init__(weight)
        self.spec, self.how, self.reader = spec, how, reader
        self.out = Head(spec.form, width, len(spec.classes))

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """One term over the labelled rows, and one more for each further view."""
        views = {"": self.spec.view} | {view: view for view in self.spec.also}
        return {name: self._term(passes, batch, view) for name, view in views.items()}

    def _term(self, passes: Passes, batch: Batch, view: str) -> Term:
        found = passes.tokens(view)
        if self.reader is None:
            x_BD = spread(pool(found, self.how), found.view)[:, 0]
        else:
            x_BD = self.reader(passes, view, view)[0]
        present_B = found.view.present_B
        logits = self.out(x_BD, present_B)
        target = torch.tensor([self._label(m) for m in batch.meta], device=logits.device)
        valid = (target >= 0) & present_B
        return Term(softmax_cross_entropy(logits, target, valid).sum(), valid.sum())

    def _label(self, meta: dict[str, Any]) -> int:
        value = meta.get(self.spec.field)
        name = None if value is None else str(value)
        return self.spec.classes.index(name) if name in self.spec.classes else -1
