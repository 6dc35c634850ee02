"""Separation tasks from their specs."""

from __future__ import annotations

from collections.abc import Mapping

from mmssl.build.later import same_cut
from mmssl.build.towers import need_view
from mmssl.frontends.wave_stem import WaveStem
from mmssl.heads.separate import MaskHead
from mmssl.specs import RunSpec, SeparateSpec
from mmssl.tasks.separate import Separate
from mmssl.towers import AnyTower, Tower
from mmssl.types import UserError


def make_separate(
    spec: RunSpec, name: str, task: SeparateSpec, towers: Mapping[str, AnyTower]
) -> Separate:
    """A separation task.

    Raises:
        UserError: names that do not exist, a tower that cannot make sound, views of open length, or
            batches with too few clips.
    """
    where = f"tasks.{name}"
    view = need_view(spec, task.view, f"{where}.view")
    tower = towers[view.tower_name]
    stem = tower.stem if isinstance(tower, Tower) else None
    if not isinstance(tower, Tower) or not isinstance(stem, WaveStem) or stem.decoder is None:
        raise UserError(
            f"{where}: towers.{view.tower_name} cannot turn what it hears into sound again; give "
            "it `cut: {kind: wave_conv, synthesis: true}`"
        )
    if view.crop_s <= 0:
        raise UserError(f"views.{task.view}.crop_s: give seconds, which mixtures have in common")
    same_cut(spec, f"{where}.clean", task.view, task.clean)
    together = spec.train.batch // spec.train.accumulate
    if together < task.sounds:
        raise UserError(
            f"{where}.sounds: {task.sounds} clips make a mixture, but train.batch / "
            f"train.accumulate is {together}; give more rows at once"
        )
    head = MaskHead(tower.width, stem.channels, task.outputs, task.mask, task.consistency)
    return Separate(name, task, head, round(view.crop_s * view.hz), task.weight)
