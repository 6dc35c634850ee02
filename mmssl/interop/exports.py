"""Towers of runs to folders that `transformers` loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmssl import config
from mmssl.eval.load import load_model
from mmssl.interop import entries, folder, hear, s3prl
from mmssl.interop.entries import Flat, flat, real
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.models import LAYOUTS
from mmssl.interop.names import State, bind
from mmssl.interop.records import logical, names_of, spec_of, task_run, tower_run
from mmssl.interop.whole import export_whole
from mmssl.model import Model
from mmssl.specs import MaskedSpec, RunSpec, Spec, TransformerSpec
from mmssl.train import checkpoint
from mmssl.types import UserError

# which of equal layouts a run means, by what its task predicts
_USUAL = {"codes": "wav2vec2", "units": "hubert"}

# the whole model: by format a further file, what loads it, and the file's text
WHOLE = {
    "mmssl": ("", "", ""),
    "hear": ("hear_mmssl/{name}.py", "hear_mmssl.{name}", hear.MODULE),
    "s3prl": ("hubconf.py", "{name}", s3prl.HUBCONF),
}

# what has no say in evaluation: how a tower starts and learns
_TRAINING = re.compile(
    r"tower\.(init|freeze|lr_scale|layer_decay|drop_tokens)"
    r"|.*\.(gradient_scale|dropout|attention_dropout|activation_dropout|output_dropout|layer_drop"
    r"|keep_first|drop_path|fresh)"
    r"|task\.(weight.*|rows|mask\..*|target\.(quantizer\.temperature.*|loss|dropout"
    r"|sentence_dropout))"
)


class ExportSpec(Spec):
    """What can be set behind `mmssl export RUN OUT`.

    format: their model type; empty = the one that fits. Or the whole model: `mmssl` for AutoModel,
    once `mmssl.interop.auto` is imported; `hear` and `s3prl` for these. tower, task: which one,
    where the run has several. heads: with the heads of pre-training, for their class of that name;
    else the encoder alone, for AutoModel. which: weights of the run, see `load_model`.
    """

    format: str = ""
    tower: str = ""
    task: str = ""
    heads: bool = False
    which: Literal["ema", "best", "last"] = "ema"


def export_run(run: Path, out: Path, options: ExportSpec | None = None) -> str:
    """Write one tower of a run for `transformers`; returns the class that loads it.

    Raises:
        UserError: several towers, something that their model has not (by name), or `out` exists.
    """
    options = options or ExportSpec()
    if options.format in WHOLE:
        return _export_whole(run, out, options)
    if options.format not in ("", *LAYOUTS):
        known = ", ".join([*WHOLE, *LAYOUTS])
        raise UserError(f"export: `format`: {options.format!r} is not known; there are {known}")
    folder.check_new(out)
    model, spec, _ = load_model(run, options.which)
    chosen = _chosen(spec, model, options)
    layout = _fitting(chosen, options.format)
    heads = _their_heads(layout, chosen) if options.heads else None
    settings = _settings(layout, heads, chosen)
    tensors = _tensors(layout, heads, chosen)
    kind = layout.encoder if heads is None else heads.name
    files = entries.write(layout.files, chosen.run, chosen.names)
    folder.write_folder(
        out,
        {**settings, "model_type": layout.name, "architectures": [kind], "dtype": "float32"},
        tensors,
        {**layout.preprocessor, **files} if files else {},
    )
    return kind


def _export_whole(run: Path, out: Path, options: ExportSpec) -> str:
    """Write the whole model; returns the class, module or entry that loads it."""
    if options.tower or options.task or options.heads:
        raise UserError(
            f"export: format={options.format} takes the whole model; leave tower, task and heads "
            "out, or leave format out for one tower"
        )
    spec = config.load(checkpoint.find(run) / "config.yaml")
    name = re.sub(r"\W", "_", spec.name)
    path, loaded_by, text = WHOLE[options.format]
    files = {path.format(name=name): text.format(name=name)} if path else {}
    kind = export_whole(run, out, options.which, files)
    return loaded_by.format(name=name) or kind


@dataclass(frozen=True)
class Chosen:
    """The tower that is exported, its view, and the task that masks it if there is one.

    names: what they are called. run: all that the run says about them. state: their tensors.
    """

    names: Mapping[str, str]
    run: Flat
    state: State

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: tuple(x.shape) for name, x in self.state.items()}


def _chosen(spec: RunSpec, model: Model, options: ExportSpec) -> Chosen:
    tower = _one("tower", options.tower, list(spec.towers))
    if not isinstance(spec.towers[tower].backbone, TransformerSpec):
        raise UserError(
            f"towers.{tower}.backbone: only a tower with a transformer of its own can be exported"
        )
    views = [name for name, view in spec.views.items() if view.tower_name == tower]
    if not views:
        raise UserError(f"towers.{tower}: no view reads it; give the view it was trained with")
    masked = {
        name: task
        for name, task in spec.tasks.items()
        if isinstance(task, MaskedSpec) and spec.views[task.view].tower_name == tower
    }
    task = _one("task", options.task, list(masked)) if masked or options.task else ""
    view = masked[task].view if task else views[0]
    names = names_of(tower, task, view)
    state = logical(model.state_dict(), names)
    run = {**tower_run(spec.towers[tower]), **flat(spec.views[view].model_dump(), "view")}
    if task:
        run |= {**task_run(masked[task]), "task.embedding": "task.embedding" in state}
    if "tower.stem.own.table.weight" in state:
        run["tower.cut.vocabulary"] = len(state["tower.stem.own.table.weight"])
    return Chosen(names, run, state)


def _one(kind: str, wanted: str, names: Sequence[str]) -> str:
    """The one that is meant."""
    if not wanted and len(names) == 1:
        return names[0]
    if wanted not in names:
        have = ", ".join(names) or "none"
        said = f"no {kind} {wanted!r}; " if wanted else f"which {kind}? say {kind}=NAME; "
        whole = f", or format={', '.join(WHOLE)} for the whole model" if kind == "tower" else ""
        raise UserError(f"export: {said}there are {have}{whole}")
    return wanted


def _fitting(chosen: Chosen, wanted: str) -> Layout:
    """The model type that is named, or the only one that can say what the tower is.

    Raises:
        UserError: none, or several of which no task says which one is meant.
    """
    if wanted:
        return LAYOUTS[wanted]
    fits: list[str] = []
    refusals: list[str] = []
    for layout in LAYOUTS.values():
        try:
            _settings(layout, None, chosen)
            fits.append(layout.name)
        except UserError as error:
            refusals.append(f"  {layout.name}: {error}")
    usual = _USUAL.get(chosen.run.get("task.target.kind", ""), "")
    if usual in fits:
        return LAYOUTS[usual]
    if not fits:
        reasons = "\n".join(refusals)
        raise UserError(f"{chosen.names['tower']}: no model type can say what it is\n{reasons}")
    if len(fits) > 1:
        raise UserError(
            f"{chosen.names['tower']}: {' and '.join(fits)} are the same model; choose one with "
            f"format={fits[0]}"
        )
    return LAYOUTS[fits[0]]


def _settings(layout: Layout, heads: Heads | None, chosen: Chosen) -> dict[str, Any]:
    """Their config.json, whose import would give the same tower.

    Raises:
        UserError: it would not; names the field.
    """
    constants = {**layout.constants, **({} if heads is None else heads.constants)}
    _same(constants, chosen, layout.name)
    keys = (*layout.keys, *(() if heads is None else heads.keys))
    settings = entries.write(keys, chosen.run, chosen.names)
    where = f"{chosen.names['tower']} as {layout.name}"
    again = {**constants, **entries.read(keys, settings, where)}
    files = entries.write(layout.files, chosen.run, chosen.names)
    again |= entries.read(layout.files, files, where)
    tower = chosen.names["tower"].partition(".")[2]
    spec = spec_of(layout, heads, again, tower, where)
    wanted = tower_run(spec.towers[tower])
    if heads is not None:
        task = spec.tasks[layout.task]
        assert isinstance(task, MaskedSpec)
        wanted |= task_run(task)
    _same(wanted, chosen, layout.name)
    return settings


def _same(wanted: Flat, chosen: Chosen, kind: str) -> None:
    """Refuse a run that says something else about the tower or the task."""
    for path, value in wanted.items():
        if path.startswith("view.") or _TRAINING.fullmatch(path):
            continue
        have = chosen.run.get(path)
        if have != value:
            raise UserError(
                f"{real(path, chosen.names)}: {have!r} has no counterpart in {kind}, whose models "
                f"have {value!r}"
            )


def _their_heads(layout: Layout, chosen: Chosen) -> Heads:
    for heads in layout.heads:
        table, _ = bind(heads.rows, chosen.shapes, layout.sizes(chosen.run))
        if any(heads.marker in rule.theirs for rule in table.rules):
            return heads
    task = chosen.names.get("task", "the run")
    raise UserError(
        f"{task}: has no heads that {layout.name} has in transformers; leave heads=true out to "
        "export the encoder"
    )


def _tensors(layout: Layout, heads: Heads | None, chosen: Chosen) -> State:
    """Tensors by their names.

    Raises:
        UserError: tensors that their model has not, or the other way round.
    """
    sizes, where = layout.sizes(chosen.run), chosen.names["tower"]
    encoder, _ = bind(layout.rows, chosen.shapes, sizes)
    extra, _ = bind(() if heads is None else heads.rows, chosen.shapes, sizes)
    known = {name for rule in (*encoder.rules, *extra.rules) for name in rule.ours}
    asked = ("tower.",) if heads is None else ("tower.", "task.")
    left = [name for name in chosen.state if name.startswith(asked) and name not in known]
    if left:
        raise UserError(f"{real(left[0], chosen.names)}: {layout.name} has no such tensor")
    tensors = encoder.write(chosen.state)
    if heads is None:
        for name, why in layout.needs.items():
            if name not in tensors:
                raise UserError(f"{where} as {layout.name}: lacks `{name}`: {why}")
        return tensors
    inside = {f"{layout.prefix}.{name}": x for name, x in tensors.items()}
    return {**inside, **extra.write(chosen.state)}
