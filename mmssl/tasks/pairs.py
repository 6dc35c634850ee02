"""`pairs`: embed named views, score chosen pairs, apply a contrastive objective.

Hosts COLA, SimCLR, CLAR, LIM, TRILL, MMV, VATT, CLAP, DAVEnet, matchmaps, EZ-VSL and the
flagship's global and dense terms.
Letters: B rows of this rank, G rows of all ranks, L slots of a row, D width of a space, Q and C the
queries and candidates of one block of scores.

The embeddings come first and the loss second: a side is embedded and gathered once, then blocks of
its rows are scored against all rows of the other side, so that the square of a global batch is
never in memory and gradients reach the rows of other ranks through the gather.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmssl.heads.dense import MapScore, PairScore
from mmssl.heads.embed import Embedder
from mmssl.objectives.contrastive import (
    Candidates,
    LogitScale,
)
from mmssl.specs import (
    CriticSpec,
    Number,
    PairSpec,
    SemiHardSpec,
    SigmoidSpec,
    TripletSpec,
)
from mmssl.tasks.base import Task
from mmssl.tasks.pair_terms import WATCHED, PairTerms, Side
from mmssl.towers import Passes
from mmssl.types import Batch, Term


class Pairs(Task):
    """Named pairs over shared projection heads."""

    def __init__(
        self,
        embedder: Embedder,
        pairs: Mapping[str, PairSpec],
        scores: Mapping[str, PairScore],
        chunk: int,
        weight: Number,
    ) -> None:
        super().__init__(weight)
        self.embedder, self.pairs, self.chunk = embedder, dict(pairs), chunk
        self.scores = nn.ModuleDict(scores)
        self.scales = nn.ModuleDict({name: _logit_scale(p) for name, p in pairs.items()})

    def weight(self, term: str) -> list[Number]:
        """The task's weight, the pair's own, and that of a penalty."""
        name, _, penalty = term.partition(".")
        pair = self.pairs[name]
        own = [p for n, p in pair.penalties.items() if n == penalty]
        own += [0.0] if penalty in WATCHED else []
        return [self._weight, pair.weight, *own]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """One term per pair: (sum over rows that have both sides, number of such rows).

        The penalties of a pair are terms named PAIR.PENALTY.
        """
        sides = self._sides(passes, batch)
        everyone = {key: side.gathered() for key, side in sides.items()}
        self.last = {
            f"{view}.{space}": side.parts[0][side.rows.present, 0].detach()
            for (view, space), side in sides.items()
            if space in self.embedder.spaces
        }
        terms: dict[str, Term] = {}
        for name, pair in self.pairs.items():
            keys = [self._key(name, view) for view in pair.between]
            a, b = ((sides[key], everyone[key]) for key in keys)
            parts = PairTerms(name, pair, self.scores[name], self.scales[name], self.chunk)
            terms |= parts.all(a, b, batch)
        return terms

    def _key(self, name: str, view: str) -> tuple[str, str]:
        """A map score has projections of its own; the others share a space."""
        return view, f"map:{name}" if self._is_map(name) else self.pairs[name].space

    def _is_map(self, name: str) -> bool:
        return isinstance(self.scores[name], MapScore)

    def _sides(self, passes: Passes, batch: Batch) -> dict[tuple[str, str], Side]:
        """Every (view, space) once, in the same order on every rank."""
        parts: dict[tuple[str, str], tuple[tuple[Tensor, ...], Tensor]] = {}
        for name, pair in self.pairs.items():
            for view in pair.between if self._is_map(name) else ():
                parts[self._key(name, view)] = self.scores[name].embed(passes, view)  # type: ignore[operator]
        for (view, space), (z_BLS, filled) in self.vectors(passes).items():
            parts[view, space] = ((z_BLS,), filled)
        return {
            key: Side(
                tensors, filled, Candidates.local(batch.source_B, filled.any(1), batch.text_B)
            )
            for key, (tensors, filled) in parts.items()
        }

    def space_keys(self) -> list[tuple[str, str]]:
        """With those that are reached in evaluation only."""
        keys = super().space_keys()
        if not self.training:
            keys += [(v, s) for v, _ in keys for s in self.embedder.evaluation_spaces(v)]
        return list(dict.fromkeys(keys))

    def vector_pairs(self) -> list[tuple[tuple[str, str], str]]:
        """All but those of map scores."""
        pairs = self.pairs.items()
        return [(pair.between, pair.space) for name, pair in pairs if not self._is_map(name)]

    def vectors(self, passes: Passes) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Each view once for all its spaces."""
        spaces: dict[str, list[str]] = {}
        for view, space in self.space_keys():
            if view not in passes.batch.views:
                continue
            spaces.setdefault(view, []).append(space)
        out: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        for view, names in spaces.items():
            vectors, filled = self.embedder(passes, view, names)
            out |= {(view, space): (z, filled) for space, z in vectors.items()}
        return out

    def maps(self) -> list[tuple[MapScore, tuple[str, str]]]:
        """The map scores and their views."""
        scores = self.scores.items()
        return [(s, self.pairs[name].between) for name, s in scores if isinstance(s, MapScore)]


def _logit_scale(pair: PairSpec) -> nn.Module:
    spec = pair.objective
    if isinstance(spec, TripletSpec | SemiHardSpec | CriticSpec):
        return nn.Identity()  # margins are in the units of the score, critics have their own scale
    if isinstance(spec, SigmoidSpec):
        return LogitScale(spec.scale, bias=spec.bias)
    if pair.score.kind == "bilinear":
        return nn.Identity()  # the bilinear form carries its own scale (COLA)
    return LogitScale(1 / spec.temperature, spec.learned, spec.max_scale)
