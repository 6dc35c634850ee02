"""`classify`: predict a label.

`Match` asks whether two views belong together (audio-visual correspondence, L3-Net and AVE-Net);
`Label` reads a field of the samples' metadata. Letters: B rows of this rank, G rows of all ranks,
R scored pairs, D width, T time steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.heads.dense import MapScore
from mmssl.heads.embed import Embedder, pool
from mmssl.heads.project import Head
from mmssl.heads.score import Distance, FusionMLP
from mmssl.objectives.classification import binary_cross_entropy, softmax_cross_entropy
from mmssl.objectives.contrastive import LogitScale
from mmssl.objectives.negatives import coin, hardest, mix_hard
from mmssl.schedules import resolve
from mmssl.specs import LabelSpec, MatchSpec, Number
from mmssl.tasks.base import Impostors, Task, gathered, row_seeds
from mmssl.towers import Passes, item_weight, spread, time_steps
from mmssl.types import Batch, Term

Parts = tuple[Tensor, ...]


class PooledReader(nn.Module):
    """Reads a view as one vector, through an MLP if `embed` has widths."""

    def __init__(
        self, views: tuple[str, str], widths: dict[str, int], how: str, embed: list[int]
    ) -> None:
        super().__init__()
        self.how = how
        self.mlps = nn.ModuleDict({view: mlp(widths[view], embed) for view in views})

    def forward(self, passes: Passes, view: str, like: str) -> Parts:
        """((B, D),) vectors of a view by the MLP of `like`."""
        tokens = passes.tokens(view)
        return (spread(self.mlps[like](pool(tokens, self.how)), tokens.view)[:, 0],)


class SpaceReader(nn.Module):
    """Reads a view as its vector in a space of a `pairs` task, which owns the weights."""

    def __init__(self, embedder: Embedder, space: str) -> None:
        super().__init__()
        self._embedder = (embedder,)  # a tuple hides the weights from this module's parameters
        self.space = space

    def forward(self, passes: Passes, view: str, like: str) -> Parts:
        """((B, S),) vectors of a view, the same that the pairs are scored with."""
        return (self._embedder[0](passes, view, [self.space])[0][self.space][:, 0],)


class VectorMatch(nn.Module):
    """Match logit of two vectors."""

    def __init__(self, reader: PooledReader | SpaceReader, score: FusionMLP | Distance) -> None:
        super().__init__()
        self.reader, self.score = reader, score

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Row-first tensors of a view."""
        parts: Parts = self.reader(passes, view, like)
        return parts

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        return self.score.pairs(a[0], b[0])


class MapMatch(nn.Module):
    """Match logit of a map score (AVOL-Net): some cell answers to the sound, or none does."""

    def __init__(self, score: MapScore, scale: LogitScale) -> None:
        super().__init__()
        self.score, self.scale = score, scale

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Projected cells or steps of a view and which of them are valid."""
        return self.score.embed(passes, view)[0]

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        logits: Tensor = self.scale(self.score.pairs(a, b))
        return logits


class JointMatch(nn.Module):
    """Match logit read from a joint tower over both views' time steps."""

    def __init__(self, tower: str, views: tuple[str, str], width: int, reduce: str) -> None:
        super().__init__()
        self.tower, self.views, self.reduce = tower, views, reduce
        self.out = nn.Linear(width, 1)

    def read(self, passes: Passes, view: str, like: str) -> Parts:
        """Tokens (B, T, D) of a view and which of them hold something."""
        tokens = passes.tokens(view)
        x, pad = time_steps(tokens, self.reduce)
        kept = (~pad).to(x.dtype) * item_weight(tokens.view).to(x.dtype)[:, None]
        return spread(x, tokens.view)[:, 0], spread(kept, tokens.view)[:, 0]

    def forward(self, passes: Passes, a: Parts, b: Parts) -> Tensor:
        """(R,) log-odds of a match."""
        parts = {name: (x, kept <= 0) for name, (x, kept) in zip(self.views, (a, b), strict=True)}
        named = passes.joints[self.tower](parts)
        logits: Tensor = self.out(next(iter(named.values())))
        return logits[:, 0]


MatchScore = VectorMatch | MapMatch | JointMatch


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
        return self.spec.classes.index(value) if value in self.spec.classes else -1


def mlp(width: int, widths: list[int]) -> nn.Module:
    """Linear maps of these widths with ReLU between them; nothing without any."""
    layers: list[nn.Module] = []
    for i, out in enumerate(widths):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Linear(width, out)]
        width = out
    return nn.Sequential(*layers)
