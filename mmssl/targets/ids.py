"""Hidden token ids as target, and the order of the sentences: BERT, ALBERT.

P items, N tokens, H hidden tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl.heads.words import IdHead, SentenceHead, TiedHead
from mmssl.masking import IdAlteration
from mmssl.objectives.classification import softmax_cross_entropy, token_cross_entropy
from mmssl.targets.base import Seen, Stats, Target
from mmssl.towers import item_weight
from mmssl.types import Term


class IdTarget(Target):
    """Cross-entropy over the vocabulary (Devlin et al. 2019); hidden ids are replaced in the input.

    Only hidden tokens are scored. sentence: reads from the same masked pass whether a pair is as in
    its document (`sentence`; next sentence or sentence order, whichever the view draws).
    """

    def __init__(
        self, head: IdHead | TiedHead, alter: IdAlteration, sentence: SentenceHead | None = None
    ) -> None:
        super().__init__()
        self.head, self.sentence = head, sentence
        self.ids = alter

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Cross-entropy per hidden token, and per pair."""
        terms = {"": Term(*token_cross_entropy(self.logits(seen), truth(seen)))}
        if self.sentence is not None:
            terms["sentence"] = _sentence(self.sentence, seen)
        return terms

    def logits(self, seen: Seen) -> Tensor:
        """(H, V) of the hidden tokens, row by row."""
        out: Tensor = self.head(seen.tokens.x_PND[seen.hidden_PN])
        return out

    def stats(self, seen: Seen) -> Stats:
        """Hits, and the histogram that the unigram baseline needs."""
        logits_HV, ids_H = self.logits(seen), truth(seen)
        histogram = torch.bincount(ids_H, minlength=logits_HV.shape[1]).double()
        return {
            "correct": (logits_HV.argmax(-1) == ids_H).sum().double().reshape(1),
            "count": histogram.sum().reshape(1),
            "histogram": histogram,
        }


def truth(seen: Seen) -> Tensor:
    """(H,) ids of the hidden tokens."""
    return seen.view.data[seen.hidden_PN]


def _sentence(head: SentenceHead, seen: Seen) -> Term:
    """Cross-entropy of the pairs' order; rows of a single segment have none."""
    order_P = seen.view.order_P
    assert order_P is not None  # `build` refuses views without pairs
    valid_P = (order_P >= 0) & (item_weight(seen.view) > 0)
    loss_P = softmax_cross_entropy(head(seen.tokens.x_PND), order_P, valid_P)
    return Term(loss_P.sum(), valid_P.sum().to(loss_P.dtype))
