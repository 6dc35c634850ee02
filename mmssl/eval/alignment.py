"""Translation between two tables of vectors by a linear map, and its refinement.

Letters: Q mapped source rows, N target rows, P pairs, D width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.objectives.precision import wide
from mmssl.tasks.players import Alignment

_CHUNK = 1024  # rows of a block of similarities
_ASKED = 10_000  # source rows that the criterion reads (Conneau et al. 2018)


class Tasks(Protocol):
    """What the criterion reads of a model."""

    tasks: nn.ModuleDict


def neighbourhood(x_QD: Tensor, y_ND: Tensor, k: int = 10) -> Tensor:
    """(Q,) mean cosine of each row with its `k` nearest rows of the other table."""
    x_QD, y_ND = F.normalize(wide(x_QD)), F.normalize(wide(y_ND))
    k = min(k, len(y_ND))
    return torch.cat([(x @ y_ND.T).topk(k).values.mean(1) for x in torch.split(x_QD, _CHUNK)])


def translate(x_QD: Tensor, y_ND: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """(Q,) nearest target row of each mapped row, and its score, by CSLS (Conneau et al. 2018).

    CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), where r is the mean cosine with the `k` nearest rows of
    the other side: rows that are near to everything are worth less.
    """
    of_x_Q, of_y_N = neighbourhood(x_QD, y_ND, k), neighbourhood(y_ND, x_QD, k)
    x_QD, y_ND = F.normalize(wide(x_QD)), F.normalize(wide(y_ND))
    best = [(2 * x @ y_ND.T - of_y_N).max(1) for x in torch.split(x_QD, _CHUNK)]
    scores_Q = torch.cat([b.values for b in best]) - of_x_Q
    return torch.cat([b.indices for b in best]), scores_Q


def mutual(x_QD: Tensor, y_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) rows of both sides that are each other's translation."""
    there_Q, _ = translate(x_QD, y_ND)
    back_N, _ = translate(y_ND, x_QD)
    rows_Q = torch.arange(len(x_QD), device=x_QD.device)
    kept = back_N[there_Q] == rows_Q
    return rows_Q[kept], there_Q[kept]


def procrustes(x_PD: Tensor, y_PD: Tensor) -> Tensor:
    """(D, D) orthogonal W for which the sum of |W x - y|^2 is least (Schönemann 1966)."""
    u, _, vh = torch.linalg.svd(wide(y_PD).T @ wide(x_PD))
    turn: Tensor = u @ vh
    return turn


@torch.no_grad()
def refined(w_DD: Tensor, source_ND: Tensor, target_ND: Tensor, rounds: int = 5) -> Tensor:
    """(D, D) map after so many rounds of pairs by `mutual` and `procrustes` on them."""
    for _ in range(rounds):
        rows, theirs = mutual(source_ND @ w_DD.T, target_ND)
        w_DD = procrustes(source_ND[rows], target_ND[theirs]).to(source_ND)
    return w_DD


def quick(model: Tasks) -> dict[str, float]:
    """{alignment.csls: mean CSLS of the translations of the most frequent rows}, without pairs.

    By which MUSE chooses among steps and seeds.
    """
    (task,) = model.tasks.values()
    assert isinstance(task, Alignment)
    with torch.no_grad():
        mapped = task.mapping(task.source_ND[:_ASKED])
        _, scores = translate(mapped, task.target_ND)
    return {"alignment.csls": float(scores.mean())}
