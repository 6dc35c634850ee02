"""`classify` tasks whose labels nobody gave, from their specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from mmssl.build.reconstruct import check_slices
from mmssl.build.towers import data_shape, need_view
from mmssl.data.labels import listed
from mmssl.specs import (
    ClassifySpec,
    ClusterSpec,
    GapSpec,
    OrderSpec,
    RotationSpec,
    RunSpec,
    SequenceSpec,
)
from mmssl.tasks.base import Task
from mmssl.tasks.clustered import Clustered
from mmssl.tasks.pretext import Gap, Order, Rotation, Succession
from mmssl.towers import AnyTower, ConvTower
from mmssl.types import UserError
from mmssl.views.pretext import tile_sizes


def make_pretext(
    name: str,
    task: ClassifySpec,
    run: RunSpec,
    towers: Mapping[str, AnyTower],
    widths: Mapping[str, int],
    check_pool: Callable[[str, str, str], None],
) -> Task:
    """A task of turns, order, gaps, successions or clusters; towers by name, widths by view.

    check_pool: refuses a pooling that a view does not have.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    target, where = task.target, f"tasks.{name}.target"
    assert isinstance(target, RotationSpec | OrderSpec | GapSpec | SequenceSpec | ClusterSpec)
    view = need_view(run, target.view, f"{where}.view")
    width, embed = widths[target.view], task.embed
    if isinstance(target, SequenceSpec):
        if task.pool != ClassifySpec.model_fields["pool"].default:
            raise UserError(f"tasks.{name}.pool: not read, single steps are compared; leave it out")
        return Succession(name, target, width, embed, task.weight)
    check_pool(f"tasks.{name}.pool", target.view, task.pool)
    if isinstance(target, ClusterSpec):
        if len(listed(run.data.train)) > 1:
            raise UserError(f"{where}: tells clips apart by their number; name one data.train")
        seed = run.train.seed
        return Clustered(name, target, width, task.pool, embed, task.weight, seed)
    tower = towers[view.tower_name]
    if tower.signal is None:
        raise UserError(f"{where}.view: ids have no signal to alter; name an audio or video view")
    axes = tower.signal.grid(data_shape(target.view, view))  # type: ignore[operator]
    if isinstance(target, RotationSpec):
        if view.modality == "audio" and len(axes) < 2:
            raise UserError(
                f"{where}.view: turns upside down what has bands; use a spectrogram as front-end"
            )
        return Rotation(name, target, width, task.pool, embed, task.weight)
    if isinstance(target, GapSpec):
        # one frame more than a slice: there is a distance
        check_slices(f"{where}.frames", tower, axes, target.frames + 1, target.frames)
        return Gap(name, target, width, task.pool, embed, task.weight)
    sizes = _sizes(f"{where}.tiles", target, axes)
    try:
        (tower.network if isinstance(tower, ConvTower) else tower.stem).grid(sizes)  # type: ignore[operator]
    except UserError as error:
        raise UserError(f"{where}.tiles: {error}; use fewer tiles, or a longer view") from error
    return Order(name, target, sizes, width, task.pool, embed, task.weight)


def _sizes(where: str, target: OrderSpec, axes: Sequence[int]) -> tuple[int, ...]:
    """Cells of a tile along each axis of the signal."""
    fits = len(target.tiles) <= len(axes)
    sizes = tile_sizes(axes, target.tiles, target.cover) if fits else (0,)
    if not prod(sizes):
        raise UserError(
            f"{where}: {target.tiles} of a signal of {' x '.join(map(str, axes))} cells; use "
            "fewer, or a longer view"
        )
    return sizes
