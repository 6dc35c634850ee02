"""Tasks whose parts take turns, from their specs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.build.stems import vector_table
from mmssl.specs import AlignmentSpec, RunSpec
from mmssl.tasks.players import Alignment
from mmssl.types import UserError

_STAND_IN = 1000  # rows of made-up vectors, where no file is named: to look at a run without data


def make_alignment(name: str, task: AlignmentSpec, run: RunSpec) -> Alignment:
    """A task that aligns two tables.

    Raises:
        UserError: a table does not fit, or the run has other tasks, which cannot take turns.
    """
    if len(run.tasks) > 1:
        raise UserError(f"tasks.{name}: its parts take turns at a step; leave the other tasks out")
    tables = [_table(f"tasks.{name}.{side}", task, side) for side in ("source", "target")]
    return Alignment(name, task, tables[0], tables[1], run.train.seed)


def _table(where: str, task: AlignmentSpec, side: str) -> Tensor:
    path: str = getattr(task, side)
    if not path:
        generator = torch.Generator().manual_seed(int(side == "target"))
        return prepared(torch.randn(_STAND_IN, task.width, generator=generator), task.normalize)
    table = vector_table(path)
    if table.ndim != 2 or table.shape[1] != task.width:
        raise UserError(
            f"{where}: {path} holds {tuple(table.shape)}, expected rows of {task.width} numbers; "
            f"set width"
        )
    if len(table) < task.frequent:
        raise UserError(
            f"{where}: {path} has {len(table)} rows; set frequent to that or less, the same share "
            "of both tables"
        )
    return prepared(table.float(), task.normalize)


def prepared(table_ND: Tensor, normalize: bool) -> Tensor:
    """Rows as they are, or of length 1 around their mean."""
    if not normalize:
        return table_ND
    unit_ND = F.normalize(table_ND)
    return F.normalize(unit_ND - unit_ND.mean(0))
