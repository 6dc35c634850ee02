"""A run as the tables see it: one tower, the view it reads and the task that masks it.

In the tables paths and tensors begin with `tower`, `view` and `task`, whatever these are called in
the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mmssl.config_errors import explain
from mmssl.interop.entries import Flat, flat, nested, real
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.names import State
from mmssl.specs import MaskedSpec, RunSpec, TowerSpec, TransformerSpec
from mmssl.types import UserError


def spec_of(layout: Layout, heads: Heads | None, run: Flat, tower: str, where: str) -> RunSpec:
    """The run of one tower that the tables speak of.

    Raises:
        UserError: a value that no run may have.
    """
    tree = nested(run)
    view = {**tree["view"], "tower": tower}
    tasks = {} if heads is None else {layout.task: {**tree["task"], "view": "x"}}
    record = {
        "name": layout.name.replace("-", "_"),
        "towers": {tower: tree["tower"]},
        "views": {"x": view},
        "tasks": tasks,
    }
    try:
        return RunSpec.model_validate(record)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunSpec, record, ())}") from error


def names_of(tower: str, task: str, view: str = "x") -> dict[str, str]:
    """What tower, task and view are called in a run."""
    found = {"tower": f"towers.{tower}", "view": f"views.{view}"}
    return {**found, "task": f"tasks.{task}"} if task else found


def logical(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """The tensors of the tower and the task by the names of the tables."""
    found: State = {}
    for short, name in names.items():
        lead = f"{name}."
        found |= {
            f"{short}.{key.removeprefix(lead)}": x
            for key, x in state.items()
            if key.startswith(lead)
        }
    return found


def real_names(state: State, names: Mapping[str, str]) -> State:
    """The inverse of `logical`."""
    return {real(name, names): x for name, x in state.items()}


def tower_run(spec: TowerSpec) -> Flat:
    """All that a tower's record says, with what follows from it written out."""
    tree = spec.model_dump()
    assert isinstance(spec.backbone, TransformerSpec)
    tree["backbone"] = _written_out(spec.backbone)
    if tree["cut"].get("kind") == "summed":
        tree["cut"]["width"] = tree["cut"]["width"] or spec.backbone.width
    return flat(tree, "tower")


def task_run(spec: MaskedSpec) -> Flat:
    """All that a task's record says, with what follows from it written out."""
    tree = spec.model_dump(exclude={"view"})
    decoder = getattr(spec.target, "decoder", None)
    if decoder is not None:
        tree["target"]["decoder"] = _written_out(decoder)
    return flat(tree, "task")


def _written_out(spec: TransformerSpec) -> dict[str, Any]:
    tree = spec.model_dump()
    tree["heads"] = spec.heads or spec.width // spec.head_size
    tree["hidden"] = spec.hidden or 4 * spec.width
    if spec.final_norm is None:
        tree["final_norm"] = not spec.post_norm and spec.layer == "transformer"
    for name in ("attention_dropout", "activation_dropout"):
        tree[name] = spec.dropout if tree[name] is None else tree[name]
    if isinstance(spec.conv_kernels, list) and len(set(spec.conv_kernels)) == 1:
        tree["conv_kernels"] = spec.conv_kernels[0]
    return tree
