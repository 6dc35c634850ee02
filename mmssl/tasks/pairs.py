"""`pairs`: embed named views, score chosen pairs, apply a contrastive objective.

Hosts COLA, MMV, VATT, CLAP, DAVEnet, matchmaps, EZ-VSL and the flagship's global and dense terms.
Letters: B rows of this rank, G rows of all ranks, L slots of a row, D width of a space, Q and C the
queries and candidates of one block of scores.

The embeddings come first and the loss second: a side is embedded and gathered once, then blocks of
its rows are scored against all rows of the other side, so that the square of a global batch is
never in memory and gradients reach the rows of other ranks through the gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.heads.dense import Dense, MapScore, PairScore
from mmssl.heads.embed import Embedder
from mmssl.heads.score import ScoreMap
from mmssl.objectives.contrastive import (
    Candidates,
    LogitScale,
    candidate_mask,
    in_row_chunks,
    info_nce,
    mil_nce,
    sigmoid_pairs,
)
from mmssl.specs import InfoNCESpec, MilNCESpec, Number, PairSpec, SigmoidSpec
from mmssl.tasks.base import Task
from mmssl.towers import Passes
from mmssl.types import Batch, Term


@dataclass(frozen=True)
class Side:
    """One view in one space: what a score reads of it, and who its rows are.

    parts: tensors with one row per batch row. filled_BL: the slots that hold an item.
    """

    parts: tuple[Tensor, ...]
    filled_BL: Tensor
    rows: Candidates

    def __getitem__(self, rows: slice) -> Side:
        return Side(tuple(p[rows] for p in self.parts), self.filled_BL[rows], self.rows[rows])

    def gathered(self) -> Side:
        """The same side with the rows of all ranks."""
        parts = tuple(
            dist.gather(p) if p.is_floating_point() else dist.gather_no_grad(p) for p in self.parts
        )
        return Side(parts, dist.gather_no_grad(self.filled_BL), self.rows.gathered())


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
        """The task's weight and the pair's own."""
        return [self._weight, self.pairs[term].weight]

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """One term per pair: (sum over rows that have both sides, number of such rows)."""
        sides = self._sides(passes, batch)
        everyone = {key: side.gathered() for key, side in sides.items()}
        self.last = {
            f"{view}.{space}": side.parts[0][side.rows.present, 0].detach()
            for (view, space), side in sides.items()
            if space in self.embedder.spaces
        }
        return {
            name: self._term(
                name,
                *(
                    (sides[key], everyone[key])
                    for key in (self._key(name, v) for v in pair.between)
                ),
            )
            for name, pair in self.pairs.items()
        }

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
        """(view, space) of every vector this task makes."""
        keys = [(v, p.space) for p in self.vector_pairs() for v in p.between]
        if not self.training:
            keys += [(v, s) for v, _ in keys for s in self.embedder.evaluation_spaces(v)]
        return list(dict.fromkeys(keys))

    def vector_pairs(self) -> list[PairSpec]:
        """The pairs that are compared as vectors."""
        return [pair for name, pair in self.pairs.items() if not self._is_map(name)]

    def vectors(self, passes: Passes) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """{(view, space): (vectors (B, L, S), filled (B, L))} of the views that the batch has."""
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

    def dense(self, passes: Passes) -> Dense | None:
        """Localization features of the first map of sounds, if there is one."""
        for name, score in self._sound_maps():
            return score.features(passes, *self.pairs[name].between)
        return None

    def map_score(self) -> ScoreMap | None:
        """The score of the first map of sounds."""
        return next((score.score for _, score in self._sound_maps()), None)

    def _sound_maps(self) -> Iterator[tuple[str, MapScore]]:
        for name, score in self.scores.items():
            if isinstance(score, MapScore) and "audio" in score.maps_of:
                yield name, score

    def _term(self, name: str, a: tuple[Side, Side], b: tuple[Side, Side]) -> Term:
        objective = self.pairs[name].objective
        per_row = {
            InfoNCESpec: self._info_nce,
            MilNCESpec: self._mil_nce,
            SigmoidSpec: self._sigmoid,
        }[type(objective)]
        loss_B = in_row_chunks(lambda rows: per_row(name, a, b, rows), len(a[0].rows), self.chunk)
        # A row with one side only may still have an equal caption as positive: it is not counted.
        both = a[0].rows.present & b[0].rows.present
        return Term(torch.where(both, loss_B, torch.zeros_like(loss_B)).sum(), both.sum())

    def _logits(self, name: str, query: Side, keys: Side, flip: bool) -> Tensor:
        """(Q, C) or (Q, C, L) logits; `flip`: the query is the pair's second side."""
        score, scale = self.scores[name], self.scales[name]
        table = (
            score(keys.parts, query.parts).transpose(0, 1)
            if flip
            else score(query.parts, keys.parts)
        )
        logits: Tensor = scale(table)
        return logits

    def _masks(self, name: str, query: Side, keys: Side) -> tuple[Tensor, Tensor]:
        return candidate_mask(query.rows, keys.rows, self.pairs[name].objective.equal_text)

    def _info_nce(
        self, name: str, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice
    ) -> Tensor:
        forward = self._one_way(name, a[0][rows], b[1], flip=False)
        spec = self.pairs[name].objective
        if isinstance(spec, InfoNCESpec) and spec.form == "one_way":
            return forward
        return (forward + self._one_way(name, b[0][rows], a[1], flip=True)) / 2

    def _one_way(self, name: str, query: Side, keys: Side, flip: bool) -> Tensor:
        logits = self._logits(name, query, keys, flip).flatten(1)
        return info_nce(logits, *self._masks(name, query, keys))

    def _sigmoid(
        self, name: str, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice
    ) -> Tensor:
        query = a[0][rows]
        logits = self._logits(name, query, b[1], flip=False).flatten(1)
        return sigmoid_pairs(logits, *self._masks(name, query, b[1]))

    def _mil_nce(
        self, name: str, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice
    ) -> Tensor:
        """`a` has one item per row, `b` may have several candidates (MMV's text side)."""
        a_rows, b_rows = a[0][rows], b[0][rows]
        forward_QCL = self._logits(name, a_rows, b[1], flip=False)
        backward_QCL = self._logits(name, b_rows, a[1], flip=True)
        positive, valid = self._masks(name, a_rows, b[1])
        _, valid_back = self._masks(name, b_rows, a[1])
        spec = self.pairs[name].objective
        assert isinstance(spec, MilNCESpec)
        return mil_nce(
            _slots_last(forward_QCL),
            _slots_last(backward_QCL),
            positive,
            valid[:, :, None] & b[1].filled_BL[None],
            valid_back[:, :, None] & b_rows.filled_BL[:, None],
            spec.form,
        )


def _slots_last(scores: Tensor) -> Tensor:
    return scores if scores.ndim == 3 else scores[..., None]


def _logit_scale(pair: PairSpec) -> nn.Module:
    spec = pair.objective
    if isinstance(spec, SigmoidSpec):
        return LogitScale(spec.scale, bias=spec.bias)
    if pair.score.kind == "bilinear":
        return nn.Identity()  # the bilinear form carries its own scale (COLA)
    return LogitScale(1 / spec.temperature, spec.learned, spec.max_scale)
