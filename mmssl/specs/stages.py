"""Records of frame labelling, and of runs in several stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from mmssl.specs.base import Spec


class LabellingSpec(Spec):
    """What data_tools/label_shards.py labels shards with, see there."""

    features: str = "mfcc"  # or mfcc_cmvn, or a run folder
    layer: int = Field(0, ge=0)  # of a run; 0 = the tower's output, L = behind its L-th layer
    tower: str = ""  # of a run with several audio towers
    clusters: tuple[int, ...] = Field((100,), min_length=1)  # size of every codebook
    codes: int = Field(0, ge=0)  # classes of the codes of a run's quantiser, instead of clusters
    kmeans: tuple[Path, ...] = ()  # clusterings, or a table of codes, to use instead of fitting any
    fit_share: float = Field(0.1, gt=0, le=1)  # share of the samples they are fitted to
    sweeps: int = 5  # over the data, points (frames in memory), restarts: see `fit_together`
    points: int = 100_000
    restarts: int = 3
    seed: int = 0
    workers: int = Field(0, ge=0)  # 0 reads in the labelling process

    @field_validator("clusters", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("clusters")
    @classmethod
    def _differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("give one or several different sizes")
        return value


class LabelStageSpec(LabellingSpec):
    """Labels of a folder of shards."""

    shards: str


class StageSpec(Spec):
    """One step: a run to train, or shards to label."""

    train: str = ""  # a file or name as `mmssl train` takes it
    overrides: list[str] = []  # of that run, as on the command line
    label: LabelStageSpec | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> StageSpec:
        if bool(self.train) == (self.label is not None):
            raise ValueError("give either `train: RUN` or `label: {...}`")
        if self.label is not None and self.overrides:
            raise ValueError("`overrides` belong to `train`; write the keys of `label` in it")
        if any(text.partition("=")[0] == "out" for text in self.overrides):
            raise ValueError("a stage has its folder below the file's `out`; take its own away")
        return self


class StagesSpec(Spec):
    """Runs and labellings one after the other, each in a folder `out`/STAGE.

    Strings of a stage may name `${shards}`, and an earlier stage's folder by `${STAGE}`.
    """

    name: str
    out: str = ""  # empty = runs/<name>
    shards: str = ""  # folder of shards
    stages: dict[str, StageSpec] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _names(cls, value: dict[str, StageSpec]) -> dict[str, StageSpec]:
        for name in value:
            if not name.isidentifier() or name in cls.model_fields:
                raise ValueError(f"`{name}` cannot name a stage; choose another word")
        return value
