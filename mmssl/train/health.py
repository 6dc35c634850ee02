"""Does an embedding collapse? Two numbers per named embedding of the last batch.

Letters in shapes: B rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MIN_ROWS = 8  # fewer rows say little about a rank
LOW_RANK, LOW_SPREAD = 2.0, 0.01
PATIENCE = 3  # measurements in a row; single batches of a young model look collapsed now and then


def effective_rank(x_BD: Tensor) -> float:
    """exp(entropy of the normalised eigenvalues of the covariance) (Roy and Vetterli 2007).

    Between 1 and min(B - 1, D); 0 where all rows are equal.
    """
    centred_BD = (x_BD - x_BD.mean(0)).double()
    # The singular values' squares are the covariance's eigenvalues, whichever of B, D is smaller.
    power = torch.linalg.svdvals(centred_BD).square()
    if power.sum() <= torch.finfo(x_BD.dtype).eps ** 2 * x_BD.double().square().sum():
        return 0.0
    share = power / power.sum()
    return float(torch.special.entr(share).sum().exp())


def spread(x_BD: Tensor) -> float:
    """Mean standard deviation per dimension of the unit-length rows, times sqrt(D).

    1 for directions spread evenly, 0 where all rows point the same way (Chen and He 2021, 4.1).
    """
    unit_BD = torch.nn.functional.normalize(x_BD.double(), dim=1)
    return float(unit_BD.std(0, correction=0).mean()) * math.sqrt(x_BD.shape[1])


class Monitor:
    """Measures embeddings; warns once when one has collapsed, again after it had recovered."""

    def __init__(self) -> None:
        self._low: dict[str, int] = {}

    def measure(self, embeddings: Mapping[str, Tensor]) -> tuple[dict[str, float], list[str]]:
        """Values by `rank/NAME` and `std/NAME`, and warnings; batches under 8 rows are left out."""
        values: dict[str, float] = {}
        warnings: list[str] = []
        for name, x_BD in embeddings.items():
            if x_BD.shape[0] < MIN_ROWS or not bool(x_BD.isfinite().all()):
                continue
            rank, std = effective_rank(x_BD.float()), spread(x_BD)
            values |= {f"rank/{name}": rank, f"std/{name}": std}
            low = rank < LOW_RANK or std < LOW_SPREAD
            self._low[name] = self._low.get(name, 0) + 1 if low else 0
            if self._low[name] == PATIENCE:
                warnings.append(
                    f"embedding `{name}` has collapsed: effective rank {rank:.2f} of "
                    f"{min(x_BD.shape[0] - 1, x_BD.shape[1])}, spread {std:.4f} (1 = even)"
                )
        return values, warnings
