"""Does a representation collapse, does a term have rows? What is measured, and when it rings.

Letters in shapes: B rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmssl.types import Floor

MIN_ROWS = 8  # fewer rows say little about a rank
LOW_RANK, LOW_SPREAD = 2.0, 0.01
_NO_ROWS = (
    "its loss is 0 and nothing learns from it; see that the data has the modalities and labels "
    "it reads and that clips are long enough for its windows"
)
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
    """Watches for collapses and for terms without rows; warns once of each, again after it had
    recovered.

    floors: of terms, and of the effective rank of embeddings that are judged by it alone, by the
    name they are reported under. Terms are sums over all ranks and over the steps since the last
    line; embeddings are those of one step and of the rank that writes.
    """

    def __init__(self, floors: Mapping[str, Floor]) -> None:
        self._floors, self._low, self._empty = floors, dict[str, int](), dict[str, int]()

    def measure(
        self, values: Mapping[str, float], embeddings: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], list[str]]:
        """What belongs into the next line of the log, and new warnings.

        `rank/NAME` and `std/NAME` of embeddings (of at least 8 rows), and `alarm/NAME` of all that
        is watched: 1 while it has collapsed or, of a term, while no row has a part in it.

        Args:
            values: of the line, `term/NAME` and `count/NAME` among them.
            embeddings: (B, D) by name.
        """
        health: dict[str, float] = {}
        found = {
            name: _fallen(name, floor, values[f"term/{name}"])
            for name, floor in self._floors.items()
            if f"term/{name}" in values
        }
        for name, x_BD in embeddings.items():
            if x_BD.shape[0] < MIN_ROWS or not bool(x_BD.isfinite().all()):
                continue
            rank, std = effective_rank(x_BD.float()), spread(x_BD)
            health |= {f"rank/{name}": rank, f"std/{name}": std}
            floor = self._floors.get(name)
            found[name] = _fallen(name, floor, rank) if floor else _shrunk(name, x_BD, rank, std)
        for name, problem in found.items():
            self._low[name] = self._low.get(name, 0) + 1 if problem else 0
            health[f"alarm/{name}"] = float(self._low[name] >= PATIENCE)
        warnings = [text for name, text in found.items() if self._low[name] == PATIENCE]
        alarms, without_rows = self._without_rows(values)
        return health | alarms, warnings + without_rows

    def _without_rows(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Alarms of the terms that no row has a part in, and one warning for all that are new."""
        empty = [name[6:] for name, rows in values.items() if name[:6] == "count/" and not rows]
        self._empty = {name: self._empty.get(name, 0) + 1 for name in empty}
        alarms = {f"alarm/{name}": float(n >= PATIENCE) for name, n in self._empty.items()}
        new = [f"`{name}`" for name, n in self._empty.items() if n == PATIENCE]
        return alarms, [f"no row has a part in {', '.join(new)}: {_NO_ROWS}"] if new else []


def _fallen(name: str, floor: Floor, value: float) -> str:
    if value >= floor.least:
        return ""
    return f"{floor.what} has collapsed: `{name}` is {value:.3g}, below {floor.least:g}; " + (
        floor.remedy
    )


def _shrunk(name: str, x_BD: Tensor, rank: float, std: float) -> str:
    if rank >= LOW_RANK and std >= LOW_SPREAD:
        return ""
    return (
        f"embedding `{name}` has collapsed: effective rank {rank:.2f} of "
        f"{min(x_BD.shape[0] - 1, x_BD.shape[1])}, spread {std:.4f} (1 = even); lower `optim.lr`, "
        "or see that targets and negatives differ"
    )
