"""The terms of one pair of `pairs`: its objective on blocks of rows against all rows.

Letters: B rows of this rank, G rows of all ranks, L slots of a row, Q and C the queries and
candidates of one block of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmssl import dist
from mmssl.heads.dense import MapScore
from mmssl.objectives.contrastive import (
    Candidates,
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
    PairSpec,
    SemiHardSpec,
    SigmoidSpec,
    TripletSpec,
)
from mmssl.tasks.base import Impostors, gathered, mixed_in
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


@dataclass(frozen=True)
class PairTerms:
    """One pair in one step. chunk: rows of a block, 0 for all; scale: of the logits."""

    name: str
    spec: PairSpec
    score: nn.Module  # a `PairScore`
    scale: nn.Module
    chunk: int

    def all(self, a: tuple[Side, Side], b: tuple[Side, Side], batch: Batch) -> dict[str, Term]:
        """The pair's terms by name; of each side its own rows, and the rows of all ranks."""
        objective = self.spec.objective
        if isinstance(objective, SemiHardSpec):
            return self._mined(a, b, batch) | self._penalties(a[0], b, batch)
        if isinstance(objective, TripletSpec | CriticSpec):
            term = self._with_impostors(a, b, batch)
        else:
            term = self._in_batch(a, b)
        return {self.name: term} | self._penalties(a[0], b, batch)

    def _in_batch(self, a: tuple[Side, Side], b: tuple[Side, Side]) -> Term:
        """Every row against all rows of the other side, block by block."""
        objective = self.spec.objective
        per_row = {
            InfoNCESpec: self._info_nce,
            MilNCESpec: self._mil_nce,
            SigmoidSpec: self._sigmoid,
        }[type(objective)]
        loss_B = in_row_chunks(lambda rows: per_row(a, b, rows), len(a[0].rows), self.chunk)
        # A row with one side only may still have an equal caption as positive: it is not counted.
        both = a[0].rows.present & b[0].rows.present
        return Term(torch.where(both, loss_B, torch.zeros_like(loss_B)).sum(), both.sum())

    def _with_impostors(self, a: tuple[Side, Side], b: tuple[Side, Side], batch: Batch) -> Term:
        """Own pairs against pairs with one random impostor, of another source.

        Triplets: a margin to one on each side (Harwath et al. 2016). Critics: one on the second.
        """
        objective, score = self.spec.objective, self.score
        both = a[0].rows.present & b[0].rows.present
        others = Impostors(batch, self.spec.between[0], both)
        (index_a, found_a), (index_b, found_b) = (others.draw(f"{self.name}/{s}") for s in "ab")
        own_B = score.pairs(a[0].parts, b[0].parts)  # type: ignore[operator]
        if isinstance(objective, CriticSpec):
            false_B = score.pairs(a[0].parts, tuple(p[index_b] for p in b[1].parts))  # type: ignore[operator]
            false_G, found_G = dist.gather(false_B), dist.gather_no_grad(found_b)
            loss_B = critic_loss(own_B, false_B, false_G, found_G, objective.bound)
            return _mean_term(loss_B.reshape(batch.size, -1).mean(1), found_b)
        assert isinstance(objective, TripletSpec)
        false_a = score.pairs(tuple(p[index_a] for p in a[1].parts), b[0].parts)  # type: ignore[operator]
        false_b = score.pairs(a[0].parts, tuple(p[index_b] for p in b[1].parts))  # type: ignore[operator]
        excess = (false - own_B + objective.margin for false in (false_a, false_b))
        return _mean_term(sum(e.clamp(min=0) for e in excess), found_a & found_b)

    def _mined(self, a: tuple[Side, Side], b: tuple[Side, Side], batch: Batch) -> dict[str, Term]:
        """Triplets with a mined negative, or the one that is mixed in, and the watched shares."""
        objective, score = self.spec.objective, self.score
        assert isinstance(objective, SemiHardSpec)
        if objective.negative == "mixed":
            index, found = mixed_in(batch, self.spec.between[1])
            own_B = score.pairs(a[0].parts, b[0].parts)  # type: ignore[operator]
            false_B = score.pairs(a[0].parts, tuple(p[index] for p in a[1].parts))  # type: ignore[operator]
            loss_B = (2 * (false_B - own_B) + objective.margin).clamp(min=0)
            found = found & a[0].rows.present
            return {
                self.name: _mean_term(loss_B, found),
                f"{self.name}.active": _mean_term((loss_B > 0).to(loss_B), found),
            }

        def columns(rows: slice) -> Tensor:
            query = a[0][rows]
            cosines = self._logits(query, b[1], flip=False).flatten(1)
            masks = self._masks(query, b[1])
            loss, found = semi_hard(cosines, *masks, objective.margin)
            return torch.stack([loss, (loss > 0).to(loss), found.to(loss)], 1)

        both = a[0].rows.present & b[0].rows.present
        values = in_row_chunks(columns, len(a[0].rows), self.chunk).unbind(1)
        names = (self.name, *(f"{self.name}.{watched}" for watched in WATCHED))
        return {key: _mean_term(value, both) for key, value in zip(names, values, strict=True)}

    def _penalties(self, a: Side, b: tuple[Side, Side], batch: Batch) -> dict[str, Term]:
        """Penalties on the own pairs; `negative` on as many pairs that do not match, too."""
        pair, score = self.spec, self.score
        both = a.rows.present & b[0].rows.present
        found: dict[str, Term] = {}
        dense = [p for p in pair.penalties if p != "temperature"]
        if dense:
            assert isinstance(score, MapScore)  # `build` refuses others
            own = score.penalties(a.parts, b[0].parts, dense)
            found = {p: _mean_term(value, both) for p, value in own.items()}
        if "negative" in dense:
            index, there = Impostors(batch, pair.between[0], both).draw(f"{self.name}/penalty")
            other = tuple(part[index] for part in b[1].parts)
            more = _mean_term(score.penalties(a.parts, other, ["negative"])["negative"], there)  # type: ignore[operator]
            first = found["negative"]
            found["negative"] = Term(first.sum + more.sum, first.count + more.count)
        if "temperature" in pair.penalties:
            low = self.scale.log_scale.clamp(max=0).square()  # type: ignore[operator]
            found["temperature"] = Term(low * both.sum(), both.sum())
        return {f"{self.name}.{p}": term for p, term in found.items()}

    def _logits(self, query: Side, keys: Side, flip: bool) -> Tensor:
        """(Q, C) or (Q, C, L) logits; `flip`: the query is the pair's second side."""
        score, scale = self.score, self.scale
        table = (
            score(keys.parts, query.parts).transpose(0, 1)
            if flip
            else score(query.parts, keys.parts)
        )
        logits: Tensor = scale(table)
        return logits

    def _masks(self, query: Side, keys: Side) -> tuple[Tensor, Tensor]:
        return candidate_mask(query.rows, keys.rows, self.spec.objective.equal_text)

    def _info_nce(self, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice) -> Tensor:
        spec = self.spec.objective
        assert isinstance(spec, InfoNCESpec)
        also = spec.form == "two_n"
        forward = self._one_way(
            a[0][rows], b[1], flip=False, own=b[0][rows], same=a[1] if also else None
        )
        if spec.form == "one_way":
            return forward
        backward = self._one_way(b[0][rows], a[1], flip=True, same=b[1] if also else None)
        return (forward + backward) / 2

    def _one_way(
        self,
        query: Side,
        keys: Side,
        flip: bool,
        own: Side | None = None,
        same: Side | None = None,
    ) -> Tensor:
        """own: the queries' partners, whose background in a `soft` map is one more negative.

        same: the queries' own side, whose other rows are negatives, too (NT-Xent).
        """
        logits = self._logits(query, keys, flip).flatten(1)
        positive, valid = self._masks(query, keys)
        score = self.score
        if own is not None and isinstance(score, MapScore) and score.score.space == "soft":
            behind = self.scale(score.pairs(query.parts, own.parts, background=True))
            there = (query.rows.present & own.rows.present)[:, None]
            logits = torch.cat([logits, behind[:, None]], 1)
            positive = torch.cat([positive, torch.zeros_like(there)], 1)
            valid = torch.cat([valid, there], 1)
        if same is not None:
            itself, there = self._masks(query, same)
            logits = torch.cat([logits, self._logits(query, same, flip).flatten(1)], 1)
            positive = torch.cat([positive, torch.zeros_like(itself)], 1)
            valid = torch.cat([valid, there & ~itself], 1)
        return info_nce(logits, positive, valid)

    def _sigmoid(self, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice) -> Tensor:
        query = a[0][rows]
        logits = self._logits(query, b[1], flip=False).flatten(1)
        return sigmoid_pairs(logits, *self._masks(query, b[1]))

    def _mil_nce(self, a: tuple[Side, Side], b: tuple[Side, Side], rows: slice) -> Tensor:
        """`a` has one item per row, `b` may have several candidates (MMV's text side)."""
        a_rows, b_rows = a[0][rows], b[0][rows]
        forward_QCL = self._logits(a_rows, b[1], flip=False)
        backward_QCL = self._logits(b_rows, a[1], flip=True)
        positive, valid = self._masks(a_rows, b[1])
        _, valid_back = self._masks(b_rows, a[1])
        spec = self.spec.objective
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
