"""What a future task predicts: the contract of its targets, and the latents of later frames.

P items, N frames, D width of the context, E width of a latent, T frames that have a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from mmssl.heads.predict import StepHeads
from mmssl.objectives.frames import Marked, Negatives, draw_negatives, frame_bce
from mmssl.targets.codes import USAGE_FLOOR, codebook_terms
from mmssl.towers import Passes
from mmssl.types import Floor, Term, Tokens, UserError

Truth = TypeVar("Truth")


@dataclass(frozen=True)
class Heard:
    """What a pass leaves for the target of a future task.

    task: its name, which names random streams. valid_PN: tokens of present items, no padding.
    """

    task: str
    tokens: Tokens
    valid_PN: Tensor
    passes: Passes


class LaterTarget(nn.Module, Generic[Truth]):
    """Truth, heads and loss of what lies so many tokens ahead; the task asks step by step.

    weights, floors: as in `mmssl.targets.base.Target`.
    """

    weights: ClassVar[Mapping[str, float]] = {}
    floors: ClassVar[Mapping[str, Floor]] = {}

    def truth(self, heard: Heard) -> Truth:
        """What there is to predict, made once for all steps."""
        raise NotImplementedError

    def forward(self, context_PTD: Tensor, truth: Truth, step: int, ahead: int) -> dict[str, Term]:
        """Terms of one step, added up over the steps; one named "" is called like its task.

        context_PTD: of tokens 0 .. T - 1, whose truths are those of `ahead` .. T - 1 + `ahead`.
        step: number of the head.
        """
        raise NotImplementedError

    def aside(self, heard: Heard) -> dict[str, Term]:
        """Terms that belong to no step; none by default."""
        return {}


@dataclass(frozen=True)
class Rivals:
    """(P, N, E) latents, and which others of the row compete with each."""

    latents_PNE: Tensor
    negatives: Negatives


class LaterLatents(LaterTarget[Rivals]):
    """Yes or no: is this the latent so many frames ahead (wav2vec, Schneider et al. 2019)?

    A tower that quantises has its codes compared, with gradient to both sides (vq-wav2vec, Baevski
    et al. 2020); their losses and use come along. Negatives are other frames of the same row, drawn
    once for every frame that is a target.
    """

    weights: ClassVar = {"accuracy": 0.0, "diversity": 0.0, "perplexity": 0.0, "usage": 0.0}
    floors: ClassVar = {"usage": USAGE_FLOOR}

    def __init__(self, heads: StepHeads, negatives: int) -> None:
        super().__init__()
        self.heads, self.negatives = heads, negatives

    def truth(self, heard: Heard) -> Rivals:
        """The latents of all frames with their negatives.

        Raises:
            UserError: the tower's stem shows no latents.
        """
        tokens = heard.tokens
        latents = tokens.features_PNE if tokens.codes is None else tokens.codes.vectors_PNQ
        if latents is None:
            raise UserError(
                f"tasks.{heard.task}.target: needs latents of the stem; use a tower whose cut is "
                "`wave_conv` or `frame_latents`"
            )
        # valid frames come first in a row: they are their own dense layout
        index_PN = torch.arange(latents.shape[1], device=latents.device).expand(latents.shape[:2])
        where = Marked(index_PN, heard.valid_PN)
        stream = f"{heard.task}/negatives"
        drawn = draw_negatives(tokens.view.seeds_P, where, self.negatives, stream=stream)
        return Rivals(latents, drawn)

    def forward(self, context_PTD: Tensor, truth: Rivals, step: int, ahead: int) -> dict[str, Term]:
        """The binary loss per asked frame (ln 2 per latent where the head is empty) and hits."""
        drawn = truth.negatives
        drawn = replace(
            drawn, index_PMK=drawn.index_PMK[:, ahead:], asked_PM=drawn.asked_PM[:, ahead:]
        )
        later_PTE = truth.latents_PNE[:, ahead:]
        guess_PTE = self.heads(context_PTD, step)
        loss = frame_bce(guess_PTE, later_PTE, truth.latents_PNE, drawn)
        return {"": Term(loss.sum, loss.count), "accuracy": Term(loss.correct, loss.count)}

    def aside(self, heard: Heard) -> dict[str, Term]:
        """Commitment, and how the codebook is used."""
        codes = heard.tokens.codes
        return {} if codes is None else codebook_terms(codes)
