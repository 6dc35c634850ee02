"""Which tokens a generator has replaced, as target: ELECTRA.

P items, N tokens, H hidden tokens, D width of the discriminator, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmssl.heads.predict import TokenHead
from mmssl.objectives.classification import binary_cross_entropy, token_cross_entropy
from mmssl.objectives.precision import wide
from mmssl.rng import row_uniform
from mmssl.targets.base import Seen, Stats, Target
from mmssl.targets.ids import IdTarget, truth
from mmssl.towers import Mask, item_weight
from mmssl.types import Term


class ReplacedTarget(Target):
    """Tell replaced tokens from original ones, among all tokens (Clark et al. 2020).

    The masked pass is the generator's; it learns to predict the hidden ids. A second pass, of the
    tower that reads `view`, sees ids sampled from it in their place, without gradient.

    generator: predicts the hidden ids. head: one logit per token of the discriminator.
    """

    weights: ClassVar = {"generator": 1.0, "replaced": 50.0}

    def __init__(self, generator: IdTarget, head: TokenHead, view: str) -> None:
        super().__init__()
        self.generator, self.head, self.view = generator, head, view
        self.ids = generator.ids

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Cross-entropy per hidden token of the generator, and per token of the discriminator."""
        logits_HV = self.generator.logits(seen)
        logits_PN, replaced_PN, valid_PN = self._judge(seen, logits_HV)
        loss_PN = binary_cross_entropy(logits_PN, replaced_PN, valid_PN)
        return {
            "generator": Term(*token_cross_entropy(logits_HV, truth(seen))),
            "replaced": Term(loss_PN.sum(), valid_PN.sum().to(loss_PN.dtype)),
        }

    def _judge(self, seen: Seen, logits_HV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, N) logits of the discriminator, whether a token is replaced, and whether it counts.

        A sampled id that equals the original one is not replaced.
        """
        ids_PN = self.sampled(seen, logits_HV)
        mask = Mask(f"{seen.task}/replaced", seen.hidden_PN, altered=ids_PN)
        tokens = seen.passes.tokens(self.view, mask, seen.view)
        logits_PN = self.head(tokens, seen.hidden_PN)[..., 0]
        valid_PN = ~tokens.pad_PN & (item_weight(seen.view) > 0)[:, None]
        return logits_PN, ids_PN != seen.view.data, valid_PN

    @torch.no_grad()
    def sampled(self, seen: Seen, logits_HV: Tensor) -> Tensor:
        """(P, N) ids with the hidden ones drawn from the generator's softmax."""
        u_PN = row_uniform(seen.view.seeds_P, seen.hidden_PN.shape[1], f"{seen.task}/sample")
        drawn_H = sample(logits_HV, u_PN[seen.hidden_PN])
        return seen.view.data.masked_scatter(seen.hidden_PN, drawn_H)

    def stats(self, seen: Seen) -> Stats:
        """Right verdicts, and how many tokens are original or replaced."""
        logits_PN, replaced_PN, valid_PN = self._judge(seen, self.generator.logits(seen))
        right_PN = (logits_PN > 0) == replaced_PN
        return {
            "correct": right_PN[valid_PN].sum().double().reshape(1),
            "count": valid_PN.sum().double().reshape(1),
            "histogram": torch.bincount(replaced_PN[valid_PN].long(), minlength=2).double(),
        }


def sample(logits_HV: Tensor, u_H: Tensor) -> Tensor:
    """(H,) classes from the softmax of their logits, one uniform number in [0, 1) each.

    The same law as the arg max with Gumbel noise of the published code, which needs a number per
    class: here the first class whose cumulative probability exceeds u.
    """
    cumulative_HV = wide(logits_HV).softmax(-1).cumsum(-1)
    mark_H1 = u_H[:, None] * cumulative_HV[:, -1:]
    return torch.searchsorted(cumulative_HV, mark_H1, right=True)[:, 0].clamp(
        max=logits_HV.shape[1] - 1
    )
