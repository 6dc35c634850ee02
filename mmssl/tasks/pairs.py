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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.heads.dense import MapScore, PairScore
from mmssl.heads.embed import Embedder
from mmssl.objectives.contrastive import (
    Candidates,
    LogitScale,
    candidate_mask,
    in_row_chunks,
    info_nce,
    mil_nce,
    sigmoid_pairs,
)
from mmssl.objectives.critic import critic_loss, semi_hard
from mmssl.specs import (
    CriticSpec,
    InfoNCESpec,
    MilNCESpec,
    Number,
    PairSpec,
    SemiHardSpec,
    SigmoidSpec,
    TripletSpec,
)
from mmssl.tasks.base import Impostors, Task, gathered, mixed_in
from mmssl.towers import Passes
from mmssl.types import Batch, Term

WATCHED = ("active", "semi_hard")  # terms of mined triplets without weight


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
        filled = dist.gather_no_grad(self.filled_BL)
        return Side(gathered(self.parts), filled, self.rows.gathered())


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
            if isinstance(pair.objective, TripletSpec | CriticSpec):
                terms[name] = self._with_impostors(name, a, b, batch)
            elif isinstance(pair.objective, SemiHardSpec):
                terms |= self._mined(name, a, b, batch)
            else:
                terms[name] = self._term(name, a, b)
            terms |= self._penalties(name, a[0], b, batch)
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

    def maps(self) -> list[tuple[MapScore, tuple[str, str]]]:
        """The map scores and their views."""
        scores = self.scores.items()
        return [(s, self.pairs[name].between) for name, s in scores if isinstance(s, MapScore)]

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

    def _with_impostors(
        self, name: str, a: tuple[Side, Side], b: tuple[Side, Side], batch: Batch
    ) -> Term:
        """Own pairs against pairs with one random impostor, of another source.

        Triplets: a margin to one on each side (Harwath et al. 2016). Critics: one on the second.
        """
        objective, score = self.pairs[name].objective, self.scores[name]
        both = a[0].rows.present & b[0].rows.present
        others = Impostors(batch, self.pairs[name].between[0], both)
        (index_a, found_a), (index_b, found_b) = (others.draw(f"{name}/{s}") for s in "ab")
        own_B = score.pairs(a[0].parts, b[0].parts)  # type: ignore[operator]
        if isinstance(objective, CriticSpec):
            false_B = score.pairs(a[0].parts, tuple(p[index_b] for p in b[1].parts))  # type: ignore[operator]
            false_G, found_G = dist.gather(false_B), dist.gather_no_grad(found_b)
            return _mean_term(
                critic_loss(own_B, false_B, false_G, found_G, objective.bound), found_b
            )
        assert isinstance(objective, TripletSpec)
        false_a = score.pairs(tuple(p[index_a] for p in a[1].parts), b[0].parts)  # type: ignore[operator]
        false_b = score.pairs(a[0].parts, tuple(p[index_b] for p in b[1].parts))  # type: ignore[operator]
        excess = (false - own_B + objective.margin for false in (false_a, false_b))
        return _mean_term(sum(e.clamp(min=0) for e in excess), found_a & found_b)

    def _mined(
        self, name: str, a: tuple[Side, Side], b: tuple[Side, Side], batch: Batch
    ) -> dict[str, Term]:
        """Triplets with a mined negative, or the one that is mixed in, and the watched shares."""
        objective, score = self.pairs[name].objective, self.scores[name]
        assert isinstance(objective, SemiHardSpec)
        if objective.negative == "mixed":
            index, found = mixed_in(batch, self.pairs[name].between[1])
            own_B = score.pairs(a[0].parts, b[0].parts)  # type: ignore[operator]
            false_B = score.pairs(a[0].parts, tuple(p[index] for p in a[1].parts))  # type: ignore[operator]
            loss_B = (2 * (false_B - own_B) + objective.margin).clamp(min=0)
            found = found & a[0].rows.present
            return {
                name: _mean_term(loss_B, found),
                f"{name}.active": _mean_term((loss_B > 0).to(loss_B), found),
            }

        def columns(rows: slice) -> Tensor:
            query = a[0][rows]
            cosines = self._logits(name, query, b[1], flip=False).flatten(1)
            masks = self._masks(name, query, b[1])
            loss, found = semi_hard(cosines, *masks, objective.margin)
            return torch.stack([loss, (loss > 0).to(loss), found.to(loss)], 1)

        both = a[0].rows.present & b[0].rows.present
        values = in_row_chunks(columns, len(a[0].rows), self.chunk).unbind(1)
        names = (name, *(f"{name}.{watched}" for watched in WATCHED))
        return {key: _mean_term(value, both) for key, value in zip(names, values, strict=True)}

    def _penalties(self, name: str, a: Side, b: tuple[Side, Side], batch: Batch) -> dict[str, Term]:
        """Penalties on the own pairs; `negative` on as many pairs that do not match, too."""
        pair, score = self.pairs[name], self.scores[name]
        both = a.rows.present & b[0].rows.present
        found: dict[str, Term] = {}
        dense = [p for p in pair.penalties if p != "temperature"]
        if dense:
            assert isinstance(score, MapScore)  # `build` refuses others
            own = score.penalties(a.parts, b[0].parts, dense)
            found = {p: _mean_term(value, both) for p, value in own.items()}
        if "negative" in dense:
            index, there = Impostors(batch, pair.between[0], both).draw(f"{name}/penalty")
            other = tuple(part[index] for part in b[1].parts)
            more = _mean_term(score.penalties(a.parts, other, ["negative"])["negative"], there)  # type: ignore[operator]
            first = found["negative"]
            found["negative"] = Term(first.sum + more.sum, first.count + more.count)
        if "temperature" in pair.penalties:
            low = self.scales[name].log_scale.clamp(max=0).square()  # type: ignore[operator]
            found["temperature"] = Term(low * both.sum(), both.sum())
        return {f"{name}.{p}": term for p, term in found.items()}

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
        spec = self.pairs[name].objective
        assert isinstance(spec, InfoNCESpec)
        also = spec.form == "two_n"
        forward = self._one_way(
            name, a[0][rows], b[1], flip=False, own=b[0][rows], same=a[1] if also else None
        )
        if spec.form == "one_way":
            return forward
        backward = self._one_way(name, b[0][rows], a[1], flip=True, same=b[1] if also else None)
        return (forward + backward) / 2

    def _one_way(
        self,
        name: str,
        query: Side,
        keys: Side,
        flip: bool,
        own: Side | None = None,
        same: Side | None = None,
    ) -> Tensor:
        """own: the queries' partners, whose background in a `soft` map is one more negative.

        same: the queries' own side, whose other rows are negatives, too (NT-Xent).
        """
        logits = self._logits(name, query, keys, flip).flatten(1)
        positive, valid = self._masks(name, query, keys)
        score = self.scores[name]
        if own is not None and isinstance(score, MapScore) and score.score.space == "soft":
            behind = self.scales[name](score.pairs(query.parts, own.parts, background=True))
            there = (query.rows.present & own.rows.present)[:, None]
            logits = torch.cat([logits, behind[:, None]], 1)
            positive = torch.cat([positive, torch.zeros_like(there)], 1)
            valid = torch.cat([valid, there], 1)
        if same is not None:
            itself, there = self._masks(name, query, same)
            logits = torch.cat([logits, self._logits(name, query, same, flip).flatten(1)], 1)
            positive = torch.cat([positive, torch.zeros_like(itself)], 1)
            valid = torch.cat([valid, there & ~itself], 1)
        return info_nce(logits, positive, valid)

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


def _mean_term(value_B: Tensor, rows_B: Tensor) -> Term:
    return Term(torch.where(rows_B, value_B, torch.zeros_like(value_B)).sum(), rows_B.sum())


def _logit_scale(pair: PairSpec) -> nn.Module:
    spec = pair.objective
    if isinstance(spec, TripletSpec | SemiHardSpec | CriticSpec):
        return nn.Identity()  # margins are in the units of the score, critics have their own scale
    if isinstance(spec, SigmoidSpec):
        return LogitScale(spec.scale, bias=spec.bias)
    if pair.score.kind == "bilinear":
        return nn.Identity()  # the bilinear form carries its own scale (COLA)
    return LogitScale(1 / spec.temperature, spec.learned, spec.max_scale)
