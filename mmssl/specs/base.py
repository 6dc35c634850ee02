"""The base of all records, modalities, and numbers that change during a run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Modality = Literal["audio", "video", "text"]


class Spec(BaseModel):
    """Base of all records: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(Spec):
    """A number that changes with the data position (share of the run's steps, 0 to 1).

    `linear`, `cosine` and `exponential` (equal ratios) go from `start` to `end` between `begin` and
    `until`; `steps` takes the value of the last `points` entry [position, value] that has been
    reached.
    """

    kind: Literal["linear", "cosine", "exponential", "steps"]
    start: float = 0.0
    end: float = 0.0
    begin: float = Field(0.0, ge=0, le=1)
    until: float = Field(1.0, ge=0, le=1)
    points: list[tuple[float, float]] = []

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if self.kind == "steps" and (not self.points or self.points[0][0] != 0.0):
            raise ValueError("a `steps` schedule needs `points` that begin at position 0")
        if self.kind != "steps" and self.until <= self.begin:
            raise ValueError("`until` must lie after `begin`")
        if self.kind == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError("an `exponential` schedule needs `start` and `end` above 0")
        return self


Number = float | Schedule
