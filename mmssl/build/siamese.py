"""Tasks over several views of a row, siamese or with prototypes, from their specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmssl.build.towers import need_view
from mmssl.heads.embed import pooling_for
from mmssl.heads.mlp import MLP
from mmssl.specs import MLPSpec, PrototypesSpec, RunSpec, SiameseSpec, ViewSpec
from mmssl.tasks.prototypes import Prototypes
from mmssl.tasks.siamese import Branch, Siamese
from mmssl.towers import AnyTower
from mmssl.types import UserError


def make_siamese(
    name: str,
    task: SiameseSpec,
    run: RunSpec,
    towers: Mapping[str, AnyTower],
    widths: Mapping[str, int],
    check_pool: Callable[[str, str, str], None],
) -> Siamese:
    """A siamese task; towers by name, widths by view.

    check_pool: refuses a pooling that a view does not have.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    views = {v: need_view(run, v, f"tasks.{name}.between") for v in task.between}
    view_of = {view.tower_name: v for v, view in views.items()}
    if len(task.queries) < len(view_of):
        raise UserError(
            f"tasks.{name}.objective.symmetric: the second view has a tower of its own, which is "
            "trained only if it asks, too; set true"
        )
    online = make_branch(name, task, views, (towers, widths), check_pool)
    predictors = {}
    if task.predictor is not None:
        predictors = _mlps(task.predictor, dict.fromkeys(view_of, task.projector.widths[-1]))
    crossed = len({view.modality for view in views.values()}) > 1
    return Siamese(task, online, predictors, name if crossed else None)


def make_branch(
    name: str,
    task: SiameseSpec | PrototypesSpec,
    views: Mapping[str, ViewSpec],
    encoders: tuple[Mapping[str, AnyTower], Mapping[str, int]],
    check_pool: Callable[[str, str, str], None],
) -> Branch:
    """The towers of these views with their projectors; encoders: towers by name, widths by view.

    Raises:
        UserError: a pooling that a view does not have, or several candidates per row.
    """
    towers, widths = encoders
    for v, view in views.items():
        if view.candidates > 1:
            raise UserError(f"views.{v}.candidates: tasks.{name} reads one per row; set 1")
    view_of = {view.tower_name: v for v, view in views.items()}
    pools = {t: pooling_for(task.pool, views[v].modality) for t, v in view_of.items()}
    for tower, v in view_of.items():
        check_pool(f"tasks.{name}.pool", v, pools[tower])
    projectors = _mlps(task.projector, {t: widths[v] for t, v in view_of.items()})
    return Branch({t: towers[t] for t in view_of}, projectors, pools)


def make_prototypes(
    name: str,
    task: PrototypesSpec,
    run: RunSpec,
    encoders: tuple[Mapping[str, AnyTower], Mapping[str, int]],
    check_pool: Callable[[str, str, str], None],
) -> Prototypes:
    """A task with prototypes; encoders and check_pool as above.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    views = {v: need_view(run, v, f"tasks.{name}.assigned") for v in task.views}
    first, *rest = (view.tower_name for view in views.values())
    if len(task.assigned) == 1 and first not in rest:
        raise UserError(
            f"tasks.{name}.others: no gradient would reach the tower {first}, whose assignments "
            "are constants; assign a second view, or let another view of it predict"
        )
    online = make_branch(name, task, views, encoders, check_pool)
    return Prototypes(task, online, task.projector.widths[-1])


def _mlps(spec: MLPSpec, inputs: Mapping[str, int]) -> dict[str, MLP]:
    options = (spec.widths, spec.norm, spec.bias, spec.constant_lr)
    return {tower: MLP(width, *options) for tower, width in inputs.items()}
