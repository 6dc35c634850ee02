"""Hidden token ids as target: BERT.

P items, N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.heads.predict import TokenHead
from mmssl.masking import corrupt_tokens
from mmssl.objectives.classification import token_cross_entropy
from mmssl.targets.base import Seen, Stats, Target
from mmssl.towers import Tower
from mmssl.types import Term, ViewBatch


class IdTarget(Target):
    """Cross-entropy over the vocabulary (Devlin et al. 2019); hidden ids are replaced in the input.

    shares: of hidden ids that become the mask and a random id; the rest stay as they are.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        vocabulary: int,
        special: dict[str, int],
        shares: tuple[float, float],
    ) -> None:
        super().__init__()
        self.head = TokenHead(width, hidden, vocabulary)
        self.vocabulary, self.shares, self.mask_id = vocabulary, shares, special["mask"]
        self.special = sorted(special.values())

    def candidates(self, view: ViewBatch) -> Tensor | None:
        """Everything but special pieces."""
        return ~torch.isin(view.data, torch.tensor(self.special, device=view.data.device))

    def altered(self, tower: Tower, view: ViewBatch, hidden_PN: Tensor) -> Tensor | None:
        """80 % mask, 10 % random id, 10 % kept, unless configured otherwise."""
        ordinary = (max(self.special) + 1, self.vocabulary)
        return corrupt_tokens(
            view.data, hidden_PN, view.seeds_P, self.mask_id, ordinary, self.shares
        )

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Cross-entropy per hidden token."""
        logits = self.head(seen.tokens, seen.hidden_PN)
        return {"": Term(*token_cross_entropy(logits, seen.view.data, seen.hidden_PN))}

    def stats(self, seen: Seen) -> Stats:
        """Hits, and the histogram that the unigram baseline needs."""
        ids = seen.view.data[seen.hidden_PN]
        hits = (self.head(seen.tokens, seen.hidden_PN)[seen.hidden_PN].argmax(-1) == ids).sum()
        histogram = torch.bincount(ids, minlength=self.vocabulary).double()
        return {
            "correct": hits.double().reshape(1),
            "count": histogram.sum().reshape(1),
            "histogram": histogram,
        }
