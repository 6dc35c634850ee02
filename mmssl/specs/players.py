"""Records of tasks whose parts take turns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Number, Spec


class AlignmentSpec(Spec):
    """A linear map of one table of vectors onto another, see `mmssl.tasks.players.Alignment`.

    `source`, `target`: safetensors files with rows of `width` numbers under the key `weight`, most
    frequent first; a run that trains needs both. `frequent`: rows that the critic sees.
    `normalize`: rows are centred and have length 1. `hidden`, `dropout` (of its input), `smooth`
    (of its labels): of the critic, which has `critic_steps` steps to one of the mapping. `beta`:
    pull towards an orthogonal mapping.
    """

    kind: Literal["alignment"]
    source: str = ""
    target: str = ""
    width: int = Field(50, gt=0)
    frequent: int = Field(75_000, gt=0)
    normalize: bool = True
    hidden: list[Annotated[int, Field(gt=0)]] = [2048, 2048]
    dropout: float = Field(0.1, ge=0, lt=1)
    smooth: float = Field(0.1, ge=0, lt=0.5)
    critic_steps: int = Field(5, gt=0)
    beta: float = Field(0.001, ge=0)
    weight: Number = 1.0
