"""Files with `stages`: runs and labellings one after the other, each in the folder OUT/STAGE.

A stage reads what earlier ones made: `${STAGE}` is the folder of a run,
`${STAGE}/labels.safetensors` the labels. Everything is checked before the first stage begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mmssl import config
from mmssl.config_errors import explain, where
from mmssl.specs import LabelStageSpec, RunSpec, Spec, StagesSpec
from mmssl.types import UserError
from mmssl.yamlfile import Layer, read_yaml, write_yaml

LABELS = "labels.safetensors"


@dataclass(frozen=True)
class Stage:
    """A stage with all references replaced.

    place: file, line and key, for messages. arguments: what it is made from, plain. digest: of
    these and of all stages before. run, or label: what is done.
    """

    name: str
    place: str
    folder: Path
    arguments: dict[str, Any]
    digest: str
    run: RunSpec | None
    label: LabelStageSpec | None


def is_staged(file: str | Path) -> bool:
    """True for a file with `stages`."""
    return "stages" in read_yaml(config.find(file)).tree


# ---------------------------------------------------------------- the file


def load(file: str | Path, overrides: Sequence[str] = ()) -> tuple[StagesSpec, list[Layer]]:
    """The file's record, references not yet replaced, and its layers.

    Args:
        file: a path or name.
        overrides: `STAGE.key=value` changes a key of the run that the stage trains, or of its
            `label`; others change a key of the file.

    Raises:
        UserError: unknown or ill-typed key; names file, line and key.
    """
    layers = [read_yaml(config.find(file))]
    stages = layers[0].tree.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    changes: dict[str, list[str]] = {}
    for text in overrides:
        name, _, rest = text.partition(".")
        if name in stages and "label" not in stages[name]:
            changes.setdefault(name, []).append(rest)
        else:
            key = f"stages.{name}.label.{rest}" if name in stages else text
            layers.append(config.override_layer(key))
    tree = config.merge(layers, resolve=False)
    for name, texts in changes.items():
        tree["stages"][name]["overrides"] = [*tree["stages"][name].get("overrides", []), *texts]
    try:
        return StagesSpec.model_validate(tree), layers
    except ValidationError as error:
        raise UserError(explain(error, StagesSpec, tree, layers)) from error


def dump(spec: StagesSpec) -> str:
    """Canonical YAML, every default written out; loads to an equal record."""
    return write_yaml(spec.model_dump(mode="json", exclude_none=True))


def plan(file: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a file in order, each checked as far as it can be before anything is done.

    Raises:
        UserError: see `load`; also a reference to no earlier stage, a run that does not load, or
            labels that do not fit the run that reads them.
    """
    spec, layers = load(file, overrides)
    out, digest = Path(spec.out or f"runs/{spec.name}"), ""
    known, stages = {"shards": spec.shards}, []
    for name, record in spec.stages.items():
        place = f"{where(('stages', name), layers)}: `stages.{name}`"
        with about(place):
            one = type(record).model_validate(_replaced(record.model_dump(mode="json"), known))
            changes = [*one.overrides, f"out={out / name}"]
            run = config.load(one.train, changes) if one.train else None
            arguments = _plain(run or one.label)
            text = json.dumps([digest, arguments], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            stages.append(Stage(name, place, out / name, arguments, digest, run, one.label))
            _check_inputs(stages[-1], stages[:-1])
        known[name] = str(out / name)
    return stages


def _replaced(tree: dict[str, Any], known: dict[str, str]) -> Any:
    """The tree with `${...}` replaced."""
    try:
        found = OmegaConf.create({**known, "stages": tree})
        return OmegaConf.to_container(found, resolve=True)["stages"]  # type: ignore[index,call-overload]
    except OmegaConfBaseException as error:
        raise UserError(
            f"{str(error).splitlines()[0]}; it can name {', '.join(known)} (the folders of the "
            "stages before it) and ${oc.env:VARIABLE}"
        ) from error


def _plain(record: Spec | None) -> dict[str, Any]:
    assert record is not None  # a stage has one of the two
    return record.model_dump(mode="json", by_alias=True)


def _check_inputs(stage: Stage, earlier: Sequence[Stage]) -> None:
    """Outputs of earlier stages are read as what they are."""
    folders = {s.folder: s for s in earlier}

    def maker(path: str) -> Stage | None:
        inside = (Path(path), *Path(path).parents)
        return next((folders[p] for p in inside if p in folders), None)

    if stage.label is not None:
        if not stage.label.shards:
            raise UserError("label.shards is empty: name a folder of shards, as shards=FOLDER")
        source = maker(stage.label.features)
        if source is not None and source.run is None:
            raise UserError(f"label.features: the stage `{source.name}` makes labels and no run")
    for name, listed in stage.run.data.frame_labels.items() if stage.run else ():
        for file in [listed] if isinstance(listed, str) else listed:
            source = maker(file)
            if source is not None and file != str(source.folder / LABELS):
                raise UserError(f"data.frame_labels.{name}={file}: labels are ${{STAGE}}/{LABELS}")
            if source is not None:
                _check_classes(stage, name, source)


def _check_classes(stage: Stage, name: str, source: Stage) -> None:
    assert stage.run is not None
    if source.label is None:
        raise UserError(f"data.frame_labels.{name}: the stage `{source.name}` makes no labels")
    made = list(source.label.clusters)
    for key, task in stage.run.tasks.items():
        if task.kind != "masked" or task.target.kind != "units" or source.label.kmeans:
            continue
        asked = task.target.classes.get(name, made)
        if made != ([asked] if isinstance(asked, int) else asked):
            raise UserError(
                f"tasks.{key}.target.classes.{name}={asked}: the stage `{source.name}` makes "
                f"{made} clusters; make them equal"
            )


@contextmanager
def about(place: str) -> Iterator[None]:
    """Errors of input inside tell the place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
