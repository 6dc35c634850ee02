"""Future tasks and their targets from their specs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil, prod
from typing import Any

from torch import nn

from mmssl.build.stems import channels
from mmssl.build.towers import make_quantizer, make_trunk, need_view
from mmssl.heads.predict import StepHeads
from mmssl.objectives.frames import frame_bce, frame_dot_nce
from mmssl.quantizers import GumbelQuantizer
from mmssl.specs import FutureSpec, LaterFrameSpec, LaterLatentSpec, RunSpec
from mmssl.targets.later import LaterFrames, LaterLatents, LaterTarget
from mmssl.tasks.future import Future
from mmssl.towers import AnyTower, Tower
from mmssl.types import UserError


def make_future(
    spec: RunSpec, name: str, task: FutureSpec, towers: Mapping[str, AnyTower]
) -> Future:
    """A future task.

    Raises:
        UserError: names that do not exist, a tower that would see what it has to predict, or parts
            that do not fit together.
    """
    where = f"tasks.{name}"
    tower_name = need_view(spec, task.view, f"{where}.view").tower_name
    tower = towers[tower_name]
    if not isinstance(tower, Tower) or not tower.trunk.causal:
        raise UserError(
            f"{where}: the backbone of towers.{tower_name} sees what it would have to predict; use "
            "a causal one: kind recurrent or causal_conv, or a transformer with causal: true"
        )
    if spec.towers[tower_name].positions.kind == "conv":
        raise UserError(
            f"{where}: the positions of towers.{tower_name} are convolutions that look ahead; use "
            "another kind"
        )
    predicts = same_cut(spec, f"{where}.predicts", task.view, task.predicts)
    field = tower.stem.fields()[0]  # type: ignore[operator]
    first = task.first or ceil(field.size / field.stride)
    if isinstance(task.target, LaterFrameSpec):
        target: LaterTarget[Any] = _frames(
            task, task.target, tower, channels(spec.towers[tower_name])
        )
    else:
        target = _latents(where, task, task.target, tower)
    steps = range(first, first + task.steps)
    return Future(name, task.view, predicts, target, steps, task.weight, task.weights)


def same_cut(spec: RunSpec, where: str, view: str, twin: str) -> str:
    """The name of a view that is compared with another one place by place; empty: that one.

    Raises:
        UserError: there is none, or it is another cut.
    """
    if not twin:
        return view
    heard = spec.views[view]
    other = need_view(spec, twin, where)
    for key in ("modality", "tower_name", "window", "crop_s", "hz", "fps", "size"):
        if getattr(heard, key) != getattr(other, key):
            key = key.removesuffix("_name")
            raise UserError(
                f"{where}: views.{twin}.{key} differs from views.{view}.{key}, so that their "
                "tokens do not match; make them equal"
            )
    return twin


def _frames(task: FutureSpec, target: LaterFrameSpec, tower: Tower, colours: int) -> LaterFrames:
    cell = colours * prod(tower.cell)
    if target.quantizer is None:
        return LaterFrames(StepHeads(tower.width, cell, task.steps))
    quantizer, temperature = make_quantizer(target.quantizer, tower.width)
    if isinstance(quantizer, GumbelQuantizer):  # VQ-APC's logits and codebook are linear maps
        quantizer.logits.reset_parameters()
        nn.init.uniform_(quantizer.codebook, -(quantizer.entries**-0.5), quantizer.entries**-0.5)
    heads = StepHeads(quantizer.width_out, cell, task.steps)
    return LaterFrames(heads, quantizer, temperature)


def _latents(where: str, task: FutureSpec, target: LaterLatentSpec, tower: Tower) -> LaterLatents:
    if tower.latent_width is None:
        raise UserError(
            f"{where}.target: `latents` needs latents of the stem; use a tower whose cut is "
            "`wave_conv` or `frame_latents`"
        )
    width = tower.latent_width if tower.quantizer is None else tower.quantizer.width_out
    objective = frame_bce
    if target.objective == "nce":
        objective = partial(frame_dot_nce, temperature=target.temperature)
    layers = target.predictor
    if layers is not None and (layers.width != tower.width or not layers.causal):
        raise UserError(
            f"{where}.target.predictor: needs the tower's width ({tower.width}), not "
            f"{layers.width}, and causal: true"
        )
    predictor = None if layers is None else make_trunk(layers, False, ())
    heads = StepHeads(tower.width, width, task.steps, target.bias)
    over_batch = target.negatives_of == "batch"
    return LaterLatents(heads, target.negatives, objective, over_batch, predictor)
