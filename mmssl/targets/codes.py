"""Quantised latents of the hidden frames as target: wav2vec 2.0 and its kin.

P rows, N frames, M hidden frames of a row, D width of the context, E width of a latent, Q width of
a quantised vector, F width of the space they are compared in.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mmssl.objectives.codes import diversity, perplexity
from mmssl.objectives.frames import draw_negatives, frame_nce, identical, marked, take
from mmssl.quantizers import Codes, Quantizer
from mmssl.schedules import resolve
from mmssl.specs import Number
from mmssl.targets.base import Seen, Stats, Target, feature_penalty
from mmssl.types import Term


class CodeTarget(Target):
    """Pick the own quantised latent among those of other hidden frames (Baevski et al. 2020).

    Only hidden frames are projected, quantised and compared. Latents are read where they are not
    masked: behind the stem's norm, before the projection that enters the backbone.

    quantizer: None compares with the latents themselves, mapped to F (Srivastava et al. 2022).
    temperatures: of the similarities, and the (scheduled) one of the quantizer.
    """

    weights: ClassVar = {"nce": 1.0, "diversity": 0.1, "commitment": 1.0, "features": 0.0} | {
        "accuracy": 0.0,
        "perplexity": 0.0,
    }

    def __init__(
        self,
        width: int,
        latent: int,
        space: int,
        quantizer: Quantizer | None,
        negatives: int,
        temperatures: tuple[float, Number],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.of_context = nn.Linear(width, space)
        self.of_code = nn.Linear(latent if quantizer is None else quantizer.width_out, space)
        self.negatives, self.temperatures = negatives, temperatures
        self.dropout = nn.Dropout(dropout)

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Contrastive, diversity and penalty terms, and what the monitors watch."""
        where = marked(seen.hidden_PN)
        seeds = seen.view.seeds_P
        latents_PME = take(self.dropout(seen.features_PNE), where)
        codes = self._quantise(latents_PME, where.filled_PM, seen)
        target_PMF = self.of_code(latents_PME if codes is None else codes.vectors_PNQ)
        context_PMF = self.of_context(take(seen.tokens.x_PND, where))
        same = None if codes is None else identical(codes.ids_PNG, codes.ids_PNG)
        negatives = draw_negatives(seeds, where, self.negatives, stream=f"{seen.task}/negatives")
        loss = frame_nce(context_PMF, target_PMF, target_PMF, negatives, self.temperatures[0], same)
        terms = {"nce": Term(loss.sum, loss.count), "features": feature_penalty(seen)}
        terms["accuracy"] = Term(loss.correct, loss.count)
        return terms if codes is None else terms | _usage(codes)

    def _quantise(self, latents_PME: Tensor, filled_PM: Tensor, seen: Seen) -> Codes | None:
        if self.quantizer is None:
            return None
        frames = latents_PME.shape[1]
        noise = self.quantizer.noise(seen.view.seeds_P, frames, f"{seen.task}/gumbel")
        tau = resolve(self.temperatures[1], seen.passes.position)
        codes: Codes = self.quantizer(latents_PME, filled_PM, tau, noise)
        return codes

    def stats(self, seen: Seen) -> Stats:
        """Hits among the negatives, and how often each entry is chosen."""
        terms = self(seen)
        return {
            "correct": terms["accuracy"].sum.double().reshape(1),
            "count": terms["accuracy"].count.double().reshape(1),
        }


def _usage(codes: Codes) -> dict[str, Term]:
    """Diversity and commitment; the perplexity of the choices counts once per frame."""
    terms = {
        "diversity": Term(*diversity(codes.soft_GV, codes.count)),
        "perplexity": Term(perplexity(codes.hard_GV, codes.count) * codes.count, codes.count),
    }
    if codes.commitment.requires_grad:
        terms["commitment"] = Term(codes.commitment, codes.count)
    return terms
