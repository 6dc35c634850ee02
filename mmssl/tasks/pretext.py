"""`classify`, labels that the view is given: how was it turned, in which order are its parts, how
far apart are two of them?

Letters: P items, K classes, N tiles, M draws of noise, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.heads.embed import pool
from mmssl.heads.mlp import mlp
from mmssl.objectives.classification import (
    binary_cross_entropy,
    correct,
    softmax_cross_entropy,
)
from mmssl.objectives.precision import wide
from mmssl.objectives.ranking import kendall_tau, normal_noise, perturbed_ranking
from mmssl.rng import row_uniform
from mmssl.specs import GapSpec, Number, OrderSpec, RotationSpec, SequenceSpec
from mmssl.tasks.base import Task
from mmssl.tasks.masked import keep_items
from mmssl.towers import Passes, item_weight, time_steps
from mmssl.types import Batch, Term, ViewBatch
from mmssl.views.pretext import TURNS, mirrored, permutations, slices, tiles, turned

_WATCHED = ("accuracy", "tau", "error")


class Pretext(Task):
    """A view's own signal, altered, encoded in the view's place in a pass named like the task.

    Terms that are only watched have weight 0.
    """

    def __init__(self, name: str, view: str, pool: str, head: nn.Module, weight: Number) -> None:
        super().__init__(weight)
        self.name, self.view, self.pool, self.head = name, view, pool, head

    def weight(self, term: str) -> list[Number]:
        """The task's weight; 0 of what is watched."""
        return [0.0] if term in _WATCHED else [self._weight]

    def _pooled(self, passes: Passes, view: ViewBatch) -> Tensor:
        """(P, D) of the items of an altered view."""
        tokens = passes.tokens(self.view, source=view, name=self.name)
        return pool(tokens, self.pool)


class Rotation(Pretext):
    """Which of four turns was applied (Gidaris et al. 2018); all four of every item, in one pass.

    Pictures turn by quarters of a circle, all frames of a video alike; spectrograms are played
    backwards, turned upside down, both or neither.
    """

    def __init__(
        self, name: str, spec: RotationSpec, width: int, how: str, embed: list[int], weight: Number
    ) -> None:
        super().__init__(name, spec.view, how, mlp(width, [*embed, TURNS]), weight)

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """Cross-entropy of the four classes, and how often the likeliest is right."""
        view, tower = batch.views[self.view], passes.tower(self.view)
        x, lengths_P = tower.inputs(view), tower.frames(view)
        if view.modality == "video":
            signals = [turned(x, k) for k in range(TURNS)]
        else:
            signals = [mirrored(x, k, lengths_P) for k in range(TURNS)]
        items = torch.arange(len(x), device=x.device).repeat(TURNS)
        logits_PK = self.head(self._pooled(passes, _items(view, items, torch.cat(signals))))
        label_P = torch.arange(TURNS, device=x.device).repeat_interleave(len(x))
        valid_P = item_weight(view)[items] > 0
        return {
            "": Term(softmax_cross_entropy(logits_PK, label_P, valid_P).sum(), valid_P.sum()),
            "accuracy": Term(*correct(logits_PK, label_P, valid_P)),
        }


class Order(Pretext):
    """In which order shuffled tiles of a signal belong (Carr et al. 2021).

    Every tile is encoded by itself, so that nothing tells its place but what it holds; an MLP reads
    the vectors of all slots and gives each a score, whose ranks are those the tiles had.
    Items whose signal is too short for tiles of these sizes (of a whole view) take no part.
    """

    def __init__(
        self,
        name: str,
        spec: OrderSpec,
        sizes: Sequence[int],
        width: int,
        how: str,
        embed: list[int],
        weight: Number,
    ) -> None:
        count = spec.count
        super().__init__(name, spec.view, how, mlp(count * width, [*embed, count]), weight)
        self.spec, self.sizes, self.count = spec, tuple(sizes), count

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The Fenchel-Young loss of the perturbed ranks, and Kendall's tau with the true ones."""
        view, tower, spec = batch.views[self.view], passes.tower(self.view), self.spec
        view = keep_items(view, tower.frames(view) >= spec.tiles[0] * self.sizes[0])
        x, lengths_P = tower.inputs(view), tower.frames(view)
        place, order = f"{self.name}/place", f"{self.name}/order"
        x_PNC = tiles(x, lengths_P, spec.tiles, self.sizes, view.seeds_P, place)
        slot_PN = permutations(view.seeds_P, self.count, order)
        rows_P1 = torch.arange(len(x), device=x.device)[:, None]
        shuffled = x_PNC[rows_P1, slot_PN].flatten(0, 1)
        items = rows_P1[:, 0].repeat_interleave(self.count)
        pooled_PND = self._pooled(passes, pieces(view, items, shuffled))
        theta_PN = self.head(pooled_PND.reshape(len(x), -1))
        true_PN, noise = slot_PN + 1, f"{self.name}/noise"
        noise_PMN = normal_noise(view.seeds_P, spec.samples, self.count, noise)
        loss_P = perturbed_ranking(theta_PN, true_PN, noise_PMN, spec.noise)
        valid_P = item_weight(view) > 0
        tau_P = kendall_tau(theta_PN, true_PN)
        return {
            "": Term(loss_P.where(valid_P, 0.0).sum(), valid_P.sum()),
            "tau": Term(tau_P.where(valid_P, 0.0).sum(), valid_P.sum()),
        }


class Gap(Pretext):
    """How far apart two slices of a clip are (TemporalGap, Tagliasacchi et al. 2020).

    Of the largest distance that the clip allows: a share d in [0, 1], uniform starts give a mean of
    1/3. The loss is -d ln p - (1 - d) ln (1 - p), which no p brings to 0: for d as that of uniform
    starts it is ln 2 = 0.693 at p = 1/2, 0.637 at p = 1/3 and 0.5 at p = d. Logits are the mean of
    both orders of the slices. Items of no more than one slice take no part.
    """

    def __init__(
        self, name: str, spec: GapSpec, width: int, how: str, embed: list[int], weight: Number
    ) -> None:
        super().__init__(name, spec.view, how, mlp(2 * width, [*embed, 1]), weight)
        self.frames = spec.frames

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """The cross-entropy, and the mean |p - d|."""
        view, tower = batch.views[self.view], passes.tower(self.view)
        view = keep_items(view, tower.frames(view) > self.frames)
        x, room_P = tower.inputs(view), (tower.frames(view) - self.frames).clamp(min=1)
        u_PN = row_uniform(view.seeds_P, 2, f"{self.name}/start").double()
        start_PN = (u_PN * (room_P[:, None] + 1)).long()
        gap_P = (start_PN[:, 0] - start_PN[:, 1]).abs() / room_P
        signal = slices(x, start_PN, self.frames).flatten(0, 1)
        items = torch.arange(len(x), device=x.device).repeat_interleave(2)
        pooled = self._pooled(passes, pieces(view, items, signal))
        pooled_P2D = pooled.reshape(len(x), 2, -1)
        orders = torch.stack([pooled_P2D, pooled_P2D.flip(1)])
        logits_P = self.head(orders.flatten(2)).mean((0, 2))
        valid_P = item_weight(view) > 0
        error_P = (logits_P.detach().sigmoid() - gap_P).abs()
        return {
            "": Term(binary_cross_entropy(logits_P, gap_P, valid_P).sum(), valid_P.sum()),
            "error": Term(error_P.where(valid_P, 0.0).sum(), valid_P.sum()),
        }


class Succession(Pretext):
    """Which of two stretches follows a step, and which precedes it (PASE's SPC, 2019).

    One step of each item and a stretch of `frames` steps on either side, `gap` away or farther, are
    drawn; a critic reads the step and a stretch. Items too short for that take no part.
    """

    def __init__(
        self, name: str, spec: SequenceSpec, width: int, embed: list[int], weight: Number
    ) -> None:
        head = mlp((1 + spec.frames) * width, [*embed, 1])
        super().__init__(name, spec.view, "", head, weight)
        self.spec = spec

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """Cross-entropy of yes and no, the mean of both stretches; the share that is right."""
        tokens = passes.tokens(self.view)
        x_PTD, pad_PT = time_steps(tokens)
        places, valid_P = self.places((~pad_PT).sum(1), tokens.view.seeds_P)
        valid_P = valid_P & (item_weight(tokens.view) > 0)
        after_P, before_P = (self.logits(x_PTD, places[0], start) for start in places[1:])
        loss_P = (F.softplus(-after_P) + F.softplus(before_P)) / 2
        right_P = ((after_P > 0).to(loss_P) + (before_P < 0).to(loss_P)) / 2
        return {
            "": Term(loss_P.where(valid_P, 0.0).sum(), valid_P.sum()),
            "accuracy": Term(right_P.where(valid_P, 0.0).sum(), valid_P.sum()),
        }

    def places(self, steps_P: Tensor, seeds_P: Tensor) -> tuple[list[Tensor], Tensor]:
        """(P,) the step, the starts of the later and of the earlier stretch; where they fit."""
        frames, gap = self.spec.frames, self.spec.gap
        reach = gap + frames - 1  # steps from the drawn one to a stretch's far end, at least
        u_P3 = row_uniform(seeds_P, 3, f"{self.name}/places")

        def drawn(i: int, count_P: Tensor) -> Tensor:
            return (u_P3[:, i] * count_P).long().clamp(min=0)

        step_P = reach + drawn(0, steps_P - 2 * reach)
        after_P = step_P + gap + drawn(1, steps_P - step_P - reach)
        before_P = drawn(2, step_P - reach + 1)
        return [step_P, after_P, before_P], steps_P > 2 * reach

    def logits(self, x_PTD: Tensor, step_P: Tensor, start_P: Tensor) -> Tensor:
        """(P,) log-odds that the stretch from `start` on follows the step."""
        stretch = start_P[:, None] + torch.arange(self.spec.frames, device=x_PTD.device)
        index = torch.cat([step_P[:, None], stretch], 1).clamp(max=x_PTD.shape[1] - 1)
        picked = x_PTD.gather(1, index[..., None].expand(-1, -1, x_PTD.shape[2]))
        logits: Tensor = self.head(picked.flatten(1))
        return wide(logits[:, 0])


def _items(view: ViewBatch, items: Tensor, signal: Tensor) -> ViewBatch:
    """The chosen items of a view, which read another signal."""
    columns: dict[str, Any] = {name: column[items] for name, column in view.columns().items()}
    return replace(view, **columns | {"signal": signal}, labels={})


def pieces(view: ViewBatch, items: Tensor, signal: Tensor) -> ViewBatch:
    """The chosen items of a view, which read another signal, without padding."""
    chosen = _items(view, items, signal)
    ones_P = torch.ones_like(chosen.lengths_P)
    return replace(chosen, data=chosen.data[:, :1], lengths_P=ones_P)
