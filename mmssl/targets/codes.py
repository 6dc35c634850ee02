"""Quantised latents of the hidden frames as target: wav2vec 2.0 and its kin.

P rows, N frames, M hidden frames of a row, D width of the context, E width of a latent, Q width of
a quantised vector, F width of the space they are compared in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mmssl.objectives.codes import diversity, perplexity, usage
from mmssl.objectives.frames import (
    FrameLoss,
    Marked,
    draw_negatives,
    frame_nce,
    identical,
    marked,
    take,
)
from mmssl.quantizers import Quantizer
from mmssl.schedules import resolve
from mmssl.specs import Number
from mmssl.targets.base import Seen, Stats, Target, feature_penalty
from mmssl.targets.readers import Everything, Reader
from mmssl.towers import item_weight
from mmssl.types import Codes, Floor, Term

_REMEDY = "raise `weights.diversity` of the task, or lower `optim.lr`"
# Of the entries of a group, effectively. Runs with 64 entries on spoken digits begin at 0.7 and
# fall where the contrast begins to be solved: with the diversity term to 0.47, without it to 0.12,
# where they stay.
USAGE_FLOOR = Floor(0.2, "the codebook", _REMEDY)


class CodeTarget(Target):
    """Pick the own quantised latent among those of other hidden frames (Baevski et al. 2020).

    Only hidden frames are projected, quantised and compared. Latents are read where they are not
    masked: behind the stem's norm, before the projection that enters the backbone.

    quantizer: None compares with the latents themselves, mapped to F (Srivastava et al. 2022).
    temperatures: of the similarities, and the (scheduled) one of the quantizer. among_all: other
    frames are all valid ones instead of the hidden ones. back: targets are mapped on from F to D,
    where the context is compared as it is (UniSpeech does both). readers: parts that read the codes
    of all frames, by name; their terms are added.
    """

    weights: ClassVar = {"nce": 1.0, "diversity": 0.1, "commitment": 1.0, "features": 0.0} | {
        "accuracy": 0.0,
        "perplexity": 0.0,
        "transcribed": 0.0,
        "usage": 0.0,
    }
    floors: ClassVar = {"usage": USAGE_FLOOR}

    def __init__(
        self,
        width: int,
        latent: int,
        space: int,
        quantizer: Quantizer | None,
        negatives: int,
        temperatures: tuple[float, Number],
        dropout: float = 0.0,
        among_all: bool = False,
        back: bool = False,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.of_context: nn.Module = nn.Identity() if back else nn.Linear(width, space)
        self.of_code: nn.Module = nn.Linear(
            latent if quantizer is None else quantizer.width_out, space
        )
        if back:
            self.of_code = nn.Sequential(self.of_code, nn.Linear(space, width))
        self.negatives, self.temperatures = negatives, temperatures
        self.dropout = nn.Dropout(dropout)
        self.among_all = among_all
        self.readers = nn.ModuleDict(readers)

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Contrastive, diversity and penalty terms, and what the monitors watch."""
        where = marked(seen.hidden_PN)
        latents_PNE = self.dropout(seen.features_PNE)
        latents_PME = take(latents_PNE, where)
        codes = self._quantise(latents_PME, where.filled_PM, seen, "gumbel")
        target_PMF = self.of_code(latents_PME if codes is None else codes.vectors_PNQ)
        ids_PMG = None if codes is None else codes.ids_PNG
        every = self._everything(latents_PNE, seen) if self.among_all or self.readers else None
        loss = self._contrast(seen, where, (ids_PMG, target_PMF), every)
        terms = {"nce": Term(loss.sum, loss.count), "features": feature_penalty(seen)}
        terms["accuracy"] = Term(loss.correct, loss.count)
        if codes is not None:
            terms |= codebook_terms(codes)
        for reader in self.readers.values():
            terms |= reader(seen, every)
        return terms

    def _contrast(
        self,
        seen: Seen,
        where: Marked,
        own: tuple[Tensor | None, Tensor],
        every: Everything | None,
    ) -> FrameLoss:
        """Each hidden frame's own target against those of others; `own`: (ids, targets)."""
        among, others = None, own
        if self.among_all:
            assert every is not None
            among = marked(every.valid_PN)
            ids_PNG = None if every.ids_PNG is None else take(every.ids_PNG, among)
            others = ids_PNG, take(every.mapped_PNF, among)
        same = None if own[0] is None or others[0] is None else identical(own[0], others[0])
        negatives = draw_negatives(
            seen.view.seeds_P, where, self.negatives, among, f"{seen.task}/negatives"
        )
        context_PMF = self.of_context(take(seen.tokens.x_PND, where))
        return frame_nce(context_PMF, own[1], others[1], negatives, self.temperatures[0], same)

    def _everything(self, latents_PNE: Tensor, seen: Seen) -> Everything:
        """Codes of all frames, with noise of their own."""
        valid_PN = ~seen.tokens.pad_PN & (item_weight(seen.view) > 0)[:, None]
        codes = self._quantise(latents_PNE, valid_PN, seen, "gumbel/all")
        if codes is None:
            return Everything(valid_PN, None, latents_PNE, self.of_code(latents_PNE))
        vectors_PNQ = codes.vectors_PNQ
        return Everything(valid_PN, codes.ids_PNG, vectors_PNQ, self.of_code(vectors_PNQ))

    def _quantise(
        self, latents_PME: Tensor, filled_PM: Tensor, seen: Seen, stream: str
    ) -> Codes | None:
        if self.quantizer is None:
            return None
        frames = latents_PME.shape[1]
        noise = self.quantizer.noise(seen.view.seeds_P, frames, f"{seen.task}/{stream}")
        tau = resolve(self.temperatures[1], seen.passes.position)
        codes: Codes = self.quantizer(latents_PME, filled_PM, tau, noise)
        return codes

    def stats(self, seen: Seen) -> Stats:
        """Hits among the negatives, against a guess among as many."""
        hits = self(seen)["accuracy"]
        count = hits.count.double().reshape(1)
        return {
            "correct": hits.sum.double().reshape(1),
            "baseline_sum": count / (1 + self.negatives),
            "count": count,
        }


def codebook_terms(codes: Codes) -> dict[str, Term]:
    """Diversity and commitment; how much is used counts once per frame."""
    terms = {
        "diversity": Term(*diversity(codes.soft_GV, codes.count)),
        "perplexity": Term(perplexity(codes.hard_GV, codes.count) * codes.count, codes.count),
        "usage": Term(usage(codes.hard_GV) * codes.count, codes.count),
    }
    if codes.commitment.requires_grad:
        terms["commitment"] = Term(codes.commitment, codes.count)
    return terms
