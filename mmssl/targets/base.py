"""What a masked task predicts: the contract of its targets.

P items, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmssl.masking import IdAlteration
from mmssl.towers import Passes, Tower
from mmssl.types import Floor, Term, Tokens, UserError, ViewBatch

Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a masked pass leaves for its target.

    task: name of the task; it names random streams and further passes. view: the items that took
    part. tokens: of the masked pass. hidden_PN: the hidden tokens of present items that have an
    output. altered: what was read instead of the view's own input, if anything.
    """

    task: str
    tower: Tower
    view: ViewBatch
    tokens: Tokens
    hidden_PN: Tensor
    altered: Tensor | None
    passes: Passes

    @property
    def features_PNE(self) -> Tensor:
        """The stem's normed latents, which the mask did not touch.

        Raises:
            UserError: the tower's stem has none.
        """
        if self.tokens.features_PNE is None:
            raise UserError(
                f"tasks.{self.task}.target: needs latents of the stem; use a tower whose cut is "
                "`wave_conv` or `frame_latents`"
            )
        return self.tokens.features_PNE


class Target(nn.Module):
    """Truth, prediction head and loss of the hidden tokens.

    A target owns everything that is trained or kept for it (head, quantiser, teacher); the task
    does not ask which target it has.

    weights: of the terms by name unless the configuration gives others, 1 if not listed. Terms of
    weight 0 are there to be watched; `floors` says which of them tell a collapse. ids: how the ids
    of a text are altered; None elsewhere. last: vectors (H, D) of the last step whose rank is
    watched, by name.
    """

    weights: ClassVar[Mapping[str, float]] = {}
    floors: ClassVar[Mapping[str, Floor]] = {}
    ids: IdAlteration | None = None

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Tensor] = {}

    @property
    def alters(self) -> bool:
        """Another input is read instead, so that no vector needs to mark what is hidden."""
        return self.ids is not None

    def candidates(self, view: ViewBatch) -> Tensor | None:
        """(P, N) tokens that may be hidden; None = all but padding."""
        return None if self.ids is None else self.ids.candidates(view.data)

    def altered(self, tower: Tower, view: ViewBatch, hidden_PN: Tensor) -> Tensor | None:
        """The stem's input to read instead of the view's own: corrupted ids, altered frames.

        None where the task itself hides the tokens.
        """
        return None if self.ids is None else self.ids(view.data, hidden_PN, view.seeds_P)

    def forward(self, seen: Seen) -> dict[str, Term]:
        """Terms by name; one named "" is called like its task."""
        raise NotImplementedError

    def stats(self, seen: Seen) -> Stats:
        """Sums that evaluation adds up over batches.

        `count` with `correct` or `error_sum`, and what the same costs without a model: its sum
        (`baseline_sum`), the `histogram` of classes, or `target_sum`, `square_sum` and `cells` of
        truths whose mean is the baseline.
        """
        raise NotImplementedError

    def after_step(self, position: float) -> None:
        """Update own buffers after an optimiser step; `position`: share of the run that is done."""


def feature_penalty(seen: Seen) -> Term:
    """Mean square of what the stem's convolutions return, before any norm (wav2vec 2.0, HuBERT).

    Counted once per hidden frame, as the losses it is weighed against.
    """
    raw = seen.tokens.raw_PNE
    count = seen.hidden_PN.sum()
    if raw is None:
        return Term(seen.tokens.x_PND.new_zeros(()), count)
    return Term(raw.float().square().mean() * count, count)
