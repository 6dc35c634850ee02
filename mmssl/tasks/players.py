"""`players`: parts of a model with losses of their own, which take turns at an optimiser step.

A player is a part of the task, and its loss the term of that name. Terms of all players are
computed at every step, that of the one on turn alone has weight, and `mmssl.train.turns` steps no
parameter but its own. Letters: B rows of this rank, N rows of a table, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.objectives.precision import wide
from mmssl.partition import assign
from mmssl.rng import row_uniform
from mmssl.specs import AlignmentSpec, Number
from mmssl.tasks.base import Task
from mmssl.towers import Passes
from mmssl.types import Batch, Term


class Players(Task):
    """A task whose parts take turns.

    rounds: steps in a row by player, in their order. The last one also trains whatever belongs to
    no other, towers included. turn: who has the step; nobody before the first, when all losses
    count.
    """

    rounds: Mapping[str, int]
    turn = ""

    def begin(self, step: int) -> None:
        """Say whose step it is: a function of its number, so that a resumed run goes on right."""
        place = step % sum(self.rounds.values())
        for player, steps in self.rounds.items():
            if 0 <= place < steps:
                self.turn = player
            place -= steps

    def weight(self, term: str) -> list[Number]:
        """The task's weight, 0 of the terms of those not on turn."""
        return [self._weight, float(self.turn in ("", term))]


class Discriminator(nn.Module):
    """Log-odds that a vector is a mapped one: layers with leaky ReLU, dropout on the input."""

    constant_lr = True  # only the mapping's rate falls

    def __init__(self, width: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([width, *hidden, 1]))

    def forward(self, x_BD: Tensor, drop: bool) -> Tensor:
        """(B, D) to (B,)."""
        x = F.dropout(x_BD, self.dropout, drop)
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        logits: Tensor = self.layers[-1](x)
        return wide(logits[:, 0])


class Alignment(Players):
    """A linear map of one table of vectors onto another, without pairs (Chung et al. 2018).

    The critic tells mapped source vectors from target vectors; the mapping, a square matrix that
    starts as the identity, makes it err (Conneau et al. 2018, MUSE). Behind each of its steps it is
    moved towards an orthogonal one: W <- (1 + beta) W - beta W W' W.

    source_ND, target_ND: the tables, most frequent rows first. Rows are drawn evenly from the first
    `spec.frequent`, by the number of the batch's row and `seed`.
    """

    source_ND: Tensor
    target_ND: Tensor

    def __init__(
        self, name: str, spec: AlignmentSpec, source_ND: Tensor, target_ND: Tensor, seed: int
    ) -> None:
        super().__init__(spec.weight)
        self.spec, self.stream = spec, f"{seed}/{name}"
        self.rounds = {"critic": spec.critic_steps, "mapping": 1}
        self.critic = Discriminator(spec.width, spec.hidden, spec.dropout)
        self.mapping = nn.Linear(spec.width, spec.width, bias=False)
        nn.init.eye_(self.mapping.weight)
        for table, rows in (("source_ND", source_ND), ("target_ND", target_ND)):
            self.register_buffer(table, rows, persistent=False)  # files of the user

    def forward(self, passes: Passes, batch: Batch) -> dict[str, Term]:
        """What the two pay for as many mapped vectors as targets."""
        u_B2 = row_uniform(batch.index_B, 2, self.stream)
        x_BD, y_BD = (
            table[(u_B * min(self.spec.frequent, len(table))).long()]
            for u_B, table in zip(u_B2.unbind(1), (self.source_ND, self.target_ND), strict=True)
        )
        mapped_BD = self.mapping(x_BD)
        still = {name: p.detach() for name, p in self.critic.named_parameters()}
        own = self.critic(torch.cat([mapped_BD.detach(), y_BD]), self.training)
        both = torch.cat([mapped_BD, y_BD])
        seen = torch.func.functional_call(self.critic, still, (both, False))
        self.last = {"mapped": mapped_BD.detach()}
        return {"critic": self._term(own, True), "mapping": self._term(seen, False)}

    def _term(self, logits_R: Tensor, honest: bool) -> Term:
        """Cross-entropy of labels that are smoothed, and turned round for the mapping."""
        mapped_R = torch.arange(len(logits_R), device=logits_R.device) < len(logits_R) // 2
        label_R = torch.where(mapped_R == honest, 1 - self.spec.smooth, self.spec.smooth)
        loss = F.binary_cross_entropy_with_logits(logits_R, label_R.to(logits_R), reduction="sum")
        return Term(loss, loss.new_tensor(float(len(logits_R))))

    @torch.no_grad()
    def after_step(self, position: float) -> None:
        """Move the mapping towards an orthogonal matrix, behind its own steps."""
        if self.turn == "mapping":
            (w_DD,) = self.mapping.parameters()
            assign(w_DD, closer_to_orthogonal(w_DD, self.spec.beta))


def closer_to_orthogonal(w_DD: Tensor, beta: float) -> Tensor:
    """A step of descent of |W'W - 1|^2 / 4 by `beta` (Parseval networks, Cisse et al. 2017)."""
    return (1 + beta) * w_DD - beta * w_DD @ (w_DD.T @ w_DD)
