"""What a future task predicts: the contract of its targets, latents and frames further on.

P items, N frames, D width of the context, E width of a latent, T frames that have a later one, K
numbers of an input cell. G rows of all ranks, Q rows and C candidates of a pool of negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl import dist
from mmssl.backbones.transformer import Transformer
from mmssl.frontends.patches import cells_of
from mmssl.heads.predict import StepHeads
from mmssl.objectives.frames import (
    FrameLoss,
    Marked,
    Negatives,
    draw_negatives,
    draw_over_rows,
)
from mmssl.objectives.precision import wide
from mmssl.quantizers import Quantizer
from mmssl.schedules import resolve
from mmssl.specs import Number
from mmssl.targets.codes import USAGE_FLOOR, codebook_terms
from mmssl.towers import Cells, Passes, Tower, spread
from mmssl.types import Codes, Floor, Term, Tokens, UserError, ViewBatch


@dataclass(frozen=True)
class Heard:
    """What a pass leaves for the target of a future task.

    task: its name, which names random streams. name, predicts: the views that are heard and
    predicted. tokens: of what is heard. valid_PN: tokens of present items, no padding.
    """

    task: str
    name: str
    predicts: str
    tokens: Tokens
    valid_PN: Tensor
    passes: Passes

    @property
    def view(self) -> ViewBatch:
        """The items that are predicted."""
        return self.passes.batch.views[self.predicts]

    @property
    def tower(self) -> Tower:
        """The tower that reads both views."""
        tower = self.passes.tower(self.predicts)
        assert isinstance(tower, Tower)  # `build` refuses others
        return tower

    def cells(self) -> Cells:
        """What the stem makes of what is predicted, with gradient."""
        seen = self.tokens
        if self.predicts != self.name:
            return self.tower.enter(self.view, position=self.passes.position).cells
        return Cells(seen.stem_PMD, seen.grid, seen.features_PNE, seen.raw_PNE, seen.codes)


@dataclass(frozen=True)
class Ahead:
    """What there is to predict, and (P, N, D) what to predict it from.

    codes: of the quantizer that one of the two has passed.
    """

    context_PND: Tensor
    codes: Codes | None


Truth = TypeVar("Truth", bound=Ahead)


class LaterTarget(nn.Module, Generic[Truth]):
    """Truth, heads and loss of what lies so many tokens ahead; the task asks step by step.

    weights, floors: as in `mmssl.targets.base.Target`.
    """

    weights: ClassVar[Mapping[str, float]] = dict.fromkeys(
        ("accuracy", "diversity", "perplexity", "usage"), 0.0
    )
    floors: ClassVar[Mapping[str, Floor]] = {"usage": USAGE_FLOOR}

    def truth(self, heard: Heard) -> Truth:
        """What there is to predict, made once for all steps."""
        raise NotImplementedError

    def forward(self, context_PTD: Tensor, truth: Truth, step: int, ahead: int) -> dict[str, Term]:
        """Terms of one step, added up over the steps; one named "" is called like its task.

        context_PTD: of tokens 0 .. T - 1, whose truths are those of `ahead` .. T - 1 + `ahead`.
        step: number of the head.
        """
        raise NotImplementedError

    def aside(self, truth: Truth) -> dict[str, Term]:
        """Terms that belong to no step: commitment, and how a codebook is used."""
        return {} if truth.codes is None else codebook_terms(truth.codes)


@dataclass(frozen=True)
class Rivals(Ahead):
    """(P, N, E) latents, and which others compete with each.

    pool_QCE: candidates, of each row (Q = P) or of all rows together (Q = 1). negatives: of each
    frame that is a target; of each that predicts, for all steps, where `at_context`.
    """

    latents_PNE: Tensor
    pool_QCE: Tensor
    negatives: Negatives
    at_context: bool

    def of(self, ahead: int) -> Negatives:
        """Those of the frames that have one `ahead`, which is asked for, as rows of the pool."""
        index, asked = self.negatives.index_PMK, self.negatives.asked_PM[:, ahead:]
        index = index[:, :-ahead] if self.at_context else index[:, ahead:]
        return Negatives(self.pooled(index), self.pooled(asked))

    def pooled(self, x_PT: Tensor) -> Tensor:
        """(P, T, ...) as (Q, P / Q * T, ...)."""
        return x_PT.reshape(self.pool_QCE.shape[0], -1, *x_PT.shape[2:])


class LaterLatents(LaterTarget[Rivals]):
    """Which is the latent so many frames ahead (CPC, van den Oord et al. 2018; wav2vec, 2019)?

    A tower that quantises has its codes compared, with gradient to both sides (vq-wav2vec, Baevski
    et al. 2020); their losses and use come along. No latent is detached.

    negatives: how many, drawn once for every frame: for a target from the others of its row, or,
    with `over_batch`, for a frame that predicts from all rows of all ranks (`draw_over_rows`).
    objective: of context, positive, candidates and negatives, e.g. `frame_bce`. predictor: causal
    layers in front of the heads.
    """

    def __init__(
        self,
        heads: StepHeads,
        negatives: int,
        objective: Callable[[Tensor, Tensor, Tensor, Negatives], FrameLoss],
        over_batch: bool = False,
        predictor: Transformer | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.negatives, self.objective = heads, negatives, objective
        self.over_batch, self.predictor = over_batch, predictor

    def truth(self, heard: Heard) -> Rivals:
        """The latents of all frames with their negatives.

        Raises:
            UserError: the tower's stem shows no latents.
        """
        cells = heard.cells()
        latents = cells.features_PME if cells.codes is None else cells.codes.vectors_PNQ
        if latents is None:
            raise UserError(
                f"tasks.{heard.task}.target: needs latents of the stem; use a tower whose cut is "
                "`wave_conv` or `frame_latents`"
            )
        context = heard.tokens.x_PND
        if self.predictor is not None:
            context, _ = self.predictor(context, heard.tokens.pad_PN)
        draw = self._over_batch if self.over_batch else self._in_row
        pool, negatives = draw(heard, latents)
        return Rivals(context, cells.codes, latents, pool, negatives, self.over_batch)

    def _in_row(self, heard: Heard, latents_PNE: Tensor) -> tuple[Tensor, Negatives]:
        # valid frames come first in a row: they are their own dense layout
        index_PN = torch.arange(latents_PNE.shape[1], device=latents_PNE.device)
        where = Marked(index_PN.expand(latents_PNE.shape[:2]), heard.valid_PN)
        seeds_P, stream = heard.tokens.view.seeds_P, f"{heard.task}/negatives"
        return latents_PNE, draw_negatives(seeds_P, where, self.negatives, stream=stream)

    def _over_batch(self, heard: Heard, latents_PNE: Tensor) -> tuple[Tensor, Negatives]:
        view, frames = heard.tokens.view, latents_PNE.shape[1]
        one = torch.tensor([frames], device=latents_PNE.device)
        most = int(dist.gather_no_grad(one).max())  # ranks pad to their own longest row
        wide_PME = F.pad(latents_PNE, (0, 0, 0, most - frames))
        pool_GME = dist.gather(spread(wide_PME, view)[:, 0])
        columns = torch.stack([heard.valid_PN.sum(1), view.seeds_P], 1)
        table_B2 = columns.new_zeros(view.present_BL.shape[0], 2)
        table_B2[view.rows_P] = columns
        lengths_G, seeds_G = dist.gather_no_grad(table_B2).unbind(1)
        row_PNK, frame_PNK = draw_over_rows(
            view.seeds_P, frames, lengths_G, seeds_G, self.negatives, f"{heard.task}/negatives"
        )
        index_PNK = row_PNK * most + frame_PNK
        return pool_GME.flatten(0, 1)[None], Negatives(index_PNK, heard.valid_PN)

    def forward(self, context_PTD: Tensor, truth: Rivals, step: int, ahead: int) -> dict[str, Term]:
        """The loss per asked frame and hits."""
        guess = truth.pooled(self.heads(context_PTD, step))
        later = truth.pooled(truth.latents_PNE[:, ahead:])
        loss = self.objective(guess, later, truth.pool_QCE, truth.of(ahead))
        return {"": Term(loss.sum, loss.count), "accuracy": Term(loss.correct, loss.count)}


@dataclass(frozen=True)
class Frames(Ahead):
    """(P, N, K) input cells, and which of them are heard."""

    cells_PNK: Tensor
    valid_PN: Tensor


class LaterFrames(LaterTarget[Frames]):
    """The input's own cells so many tokens ahead by their absolute error (APC, Chung et al. 2019).

    quantizer: what the heads read instead of the context, at a (scheduled) temperature (VQ-APC,
    Chung et al. 2020). Padding does not count, which the released code averages over.
    """

    def __init__(
        self, heads: StepHeads, quantizer: Quantizer | None = None, temperature: Number = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.quantizer, self.temperature = heads, quantizer, temperature

    def truth(self, heard: Heard) -> Frames:
        """The cells under the tokens, data without gradient."""
        seen, tower = heard.tokens, heard.tower
        cells_PNK = cells_of(tower.inputs(heard.view).detach(), seen.grid, tower.cell)
        context, codes = seen.x_PND, None
        if self.quantizer is not None:
            stream = f"{heard.task}/gumbel"
            noise = self.quantizer.noise(seen.view.seeds_P, context.shape[1], stream)
            tau = resolve(self.temperature, heard.passes.position)
            codes = self.quantizer(context, heard.valid_PN, tau, noise)
            context = codes.vectors_PNQ.to(context.dtype)
        return Frames(context, codes, cells_PNK, heard.valid_PN)

    def forward(self, context_PTD: Tensor, truth: Frames, step: int, ahead: int) -> dict[str, Term]:
        """Mean absolute error per number of the cells."""
        valid_PT1 = truth.valid_PN[:, ahead:, None]
        guess_PTK = wide(self.heads(context_PTD, step))
        error_PTK = (guess_PTK - truth.cells_PNK[:, ahead:]).abs()
        total = torch.where(valid_PT1, error_PTK, torch.zeros_like(error_PTK)).sum()
        return {"": Term(total, valid_PT1.sum().to(total.dtype) * error_PTK.shape[-1])}
