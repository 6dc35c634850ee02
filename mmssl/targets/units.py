"""Cluster ids of frames as target: HuBERT, WavLM.

P items, N frames, G codebooks, H hidden frames, D width, C clusters, F width they are compared in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmssl.data.labels import NO_LABEL, frame_ids
from mmssl.objectives.classification import correct
from mmssl.objectives.codes import codeword_cross_entropy, codeword_logits, perplexity
from mmssl.targets.base import Seen, Stats, Target, feature_penalty
from mmssl.types import Floor, Term

# A perplexity of 1.5: one class takes at least 86 % of the frames. Labels that pass the check, none
# of whose classes may hold more than 70 %, have at least 1.84.
_LOW_PREDICTED = 1.5
_REMEDY = "lower `optim.lr`, lengthen its warm-up, or look at the labels"


class UnitTarget(Target):
    """Cross-entropy of offline cluster ids by cosine with learned codewords (Hsu et al. 2021).

    Label sets that several clusterings gave (an ensemble) have a projection and a table each, and
    their losses add up.

    classes: clusters of every codebook of every label set of the run's `data.frame_labels`.
    """

    weights: ClassVar = {"features": 0.0, "accuracy": 0.0, "predicted": 0.0}
    floors: ClassVar = {"predicted": Floor(_LOW_PREDICTED, "the prediction of units", _REMEDY)}

    def __init__(
        self,
        width: int,
        space: int,
        classes: Mapping[str, Sequence[int]],
        temperature: float,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.classes = {name: tuple(sizes) for name, sizes in classes.items()}
        for name, book, size in self._books():
            self.register_module(f"project_{name}_{book}", nn.Linear(width, space))
            self.register_parameter(
                f"codewords_{name}_{book}", nn.Parameter(torch.rand(size, space))
            )

    def _books(self) -> Iterator[tuple[str, int, int]]:
        for name, sizes in self.classes.items():
            for book, size in enumerate(sizes):
                yield name, book, size

    def forward(self, seen: Seen) -> dict[str, Term]:
        """One term per codebook and the penalty on the features; of the first codebook, accuracy
        and how many classes are predicted (exp of their entropy, over all ranks).
        """
        terms: dict[str, Term] = {"features": feature_penalty(seen)}
        for name, book, _ in self._books():
            logits, labels = self._predict(seen, name, book)
            single = len(self.classes) == 1 and len(self.classes[name]) == 1
            terms["units" if single else f"units_{name}_{book}"] = Term(
                *codeword_cross_entropy(logits, labels)
            )
            terms.setdefault("accuracy", Term(*correct(logits, labels)))
            terms.setdefault("predicted", _predicted(logits))
        return terms

    def _predict(self, seen: Seen, name: str, book: int) -> tuple[Tensor, Tensor]:
        """(H, C) logits and (H,) labels of the hidden frames that have a label."""
        frames, hz = seen.tokens.grid[0], seen.tokens.rate_hz
        labels_PN = frame_ids(seen.view, name, frames, hz)[..., book]
        asked_PN = seen.hidden_PN & (labels_PN != NO_LABEL)
        project = self.get_submodule(f"project_{name}_{book}")
        codewords = self.get_parameter(f"codewords_{name}_{book}")
        context_HF = project(seen.tokens.x_PND[asked_PN])
        return codeword_logits(context_HF, codewords, self.temperature), labels_PN[asked_PN]

    def stats(self, seen: Seen) -> Stats:
        """Hits of the first codebook, and the histogram of its labels."""
        name, book, size = next(self._books())
        logits, labels = self._predict(seen, name, book)
        return {
            "correct": (logits.argmax(-1) == labels).sum().double().reshape(1),
            "count": labels.new_tensor([len(labels)]).double(),
            "histogram": torch.bincount(labels, minlength=size).double(),
        }


@torch.no_grad()
def _predicted(logits_HC: Tensor) -> Term:
    """Perplexity of the likeliest classes, counted once per frame."""
    chosen_C = torch.bincount(logits_HC.argmax(-1), minlength=logits_HC.shape[1]).to(logits_HC)
    count = chosen_C.sum()
    return Term(perplexity(chosen_C[None], count) * count, count)
