"""Targets of masked tasks from their specs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import nn

from mmssl.build.towers import channels, data_shape, make_trunk
from mmssl.frontends import FactorisedPositions
from mmssl.frontends.fixed_positions import SinusoidPositions
from mmssl.heads.predict import PatchDecoder, TokenHead
from mmssl.masking import FrameAlteration, FrequencyBand, MagnitudeNoise, SpecMasks, TimeSpans
from mmssl.objectives.regression import scaled_square, smooth_l1
from mmssl.quantizers import GumbelQuantizer, Quantizer, VectorQuantizer
from mmssl.specs import (
    CodeTargetSpec,
    FixedPositionSpec,
    FramesSpec,
    FrameTargetSpec,
    IdTargetSpec,
    KaldiSpec,
    LatentTargetSpec,
    MaskedSpec,
    NearestSpec,
    Number,
    PatchTargetSpec,
    RunSpec,
    Spec,
    SpectrumSpec,
    TowerSpec,
    UnitTargetSpec,
    ViewSpec,
)
from mmssl.targets.base import Target
from mmssl.targets.codes import CodeTarget
from mmssl.targets.frames import FrameTarget
from mmssl.targets.ids import IdTarget
from mmssl.targets.latents import LatentTarget, Loss
from mmssl.targets.patches import PatchTarget
from mmssl.targets.units import UnitTarget
from mmssl.towers import Tower
from mmssl.types import UserError


@dataclass(frozen=True)
class TargetContext:
    """What the target of the masked task `name` is made for."""

    name: str
    task: MaskedSpec
    run: RunSpec
    tower: Tower
    vocab_size: int
    special: dict[str, int]

    @property
    def view(self) -> ViewSpec:
        """The view that is masked."""
        return self.run.views[self.task.view]

    @property
    def tower_spec(self) -> TowerSpec:
        """The tower that reads the view."""
        return self.run.towers[self.view.tower_name]


def check_mask(context: TargetContext) -> None:
    """Refuse masks that would leak.

    Raises:
        UserError: hidden cells would show elsewhere.
    """
    task = context.task
    if shows_motion(context.tower_spec) and task.mask.rule != "tubes":
        raise UserError(
            f"tasks.{context.name}.mask.rule: {task.mask.rule} would leak hidden cells through the "
            "clip's background (frontend.channels); use tubes"
        )


def shows_motion(tower: TowerSpec) -> bool:
    """The tower's front-end compares frames with the clip's background."""
    return isinstance(tower.frontend, FramesSpec) and tower.frontend.channels != "rgb"


def _ids(context: TargetContext) -> Target:
    task, modality = context.task, context.view.modality
    if modality != "text":
        raise UserError(
            f"tasks.{context.name}.target: `ids` needs a text view, {task.view} is {modality}"
        )
    return IdTarget(
        context.tower.width, task.hidden, context.vocab_size, context.special, task.mask.shares
    )


def _patches(context: TargetContext) -> Target:
    target = context.task.target
    assert isinstance(target, PatchTargetSpec)
    cell = channels(context.tower_spec) * prod(context.tower.cell)
    return PatchTarget(_head(context, target, cell), target.normalize, target.loss)


def _head(context: TargetContext, target: PatchTargetSpec, out: int) -> TokenHead | PatchDecoder:
    task, width = context.task, context.tower.width
    dropped = task.mask.hide == "drop"
    if dropped != (target.decoder is not None):
        raise UserError(
            f"tasks.{context.name}: mask.hide drop and target.decoder need each other: what the "
            "encoder does not see, a decoder must predict"
        )
    if target.decoder is None:
        return TokenHead(width, task.hidden, out)
    trunk = make_trunk(target.decoder, False, ())
    grid = context.tower.grid_of(data_shape(task.view, context.view))
    places: nn.Module = FactorisedPositions(grid, trunk.width)
    if isinstance(context.tower_spec.positions, FixedPositionSpec):
        places = SinusoidPositions(trunk.width, context.tower_spec.positions.layout)
    return PatchDecoder(width, places, trunk, out)


def _codes(context: TargetContext) -> Target:
    target = context.task.target
    assert isinstance(target, CodeTargetSpec)
    latent = context.tower.latent_width
    if latent is None:
        raise UserError(
            f"tasks.{context.name}.target: `codes` needs latents of the stem; use a tower whose "
            "cut is `wave_conv`"
        )
    quantizer, tau = _quantizer(target, latent)
    return CodeTarget(
        context.tower.width,
        latent,
        target.space,
        quantizer,
        target.negatives,
        (target.temperature, tau),
        target.dropout,
    )


def _quantizer(target: CodeTargetSpec, latent: int) -> tuple[Quantizer | None, Number]:
    """The quantizer and its temperature."""
    spec = target.quantizer
    if spec is None:
        return None, 1.0
    if isinstance(spec, NearestSpec):
        options = spec.model_dump(exclude={"kind"})
        return VectorQuantizer(latent, **options), 1.0
    options = spec.model_dump(exclude={"kind", "width", "temperature"})
    return GumbelQuantizer(latent, spec.width, **options), spec.temperature


def _units(context: TargetContext) -> Target:
    target = context.task.target
    assert isinstance(target, UnitTargetSpec)
    unknown = sorted(set(target.classes) - set(context.run.data.frame_labels))
    if unknown and context.run.data.frame_labels:
        raise UserError(
            f"tasks.{context.name}.target.classes: no labels {unknown[0]!r} in data.frame_labels; "
            f"there are {', '.join(context.run.data.frame_labels)}"
        )
    classes = {n: [k] if isinstance(k, int) else k for n, k in target.classes.items()}
    return UnitTarget(context.tower.width, target.space, classes, target.temperature)


def _frames(context: TargetContext) -> Target:
    target, task = context.task.target, context.task
    assert isinstance(target, FrameTargetSpec)
    kinds = {"time": TimeSpans, "frequency": FrequencyBand, "masks": SpecMasks}
    parts = {
        name: kind(**getattr(target, name).model_dump())
        for name, kind in {**kinds, "noise": MagnitudeNoise}.items()
        if getattr(target, name) is not None
    }
    if not parts:
        raise UserError(
            f"tasks.{context.name}.target: give time, frequency, masks or noise; nothing is altered"
        )
    spectrum = isinstance(context.tower_spec.frontend, SpectrumSpec | KaldiSpec)
    if not spectrum or task.mask.rule != "all":
        raise UserError(
            f"tasks.{context.name}.target: `frames` needs a spectrogram and mask.rule all"
        )
    cell = prod(context.tower.cell)
    return FrameTarget(
        context.name, context.tower.width, task.hidden, cell, FrameAlteration(**parts)
    )


def _latents(context: TargetContext) -> Target:
    target, tower = context.task.target, context.tower
    assert isinstance(target, LatentTargetSpec)
    if target.layers > len(tower.trunk.blocks):
        raise UserError(
            f"tasks.{context.name}.target.layers: {target.layers} of {len(tower.trunk.blocks)} "
            "layers; give no more than the backbone has"
        )
    losses: dict[str, Loss] = {
        "scaled_square": scaled_square,
        "smooth_l1": partial(smooth_l1, beta=target.beta),
        "smooth_l1_sum": partial(smooth_l1, beta=target.beta, summed=True),
    }
    return LatentTarget(
        TokenHead(tower.width, context.task.hidden, tower.trunk_width),
        tower.trunk,
        target.decay,
        target.layers,
        target.tap,
        target.norm,
        target.again,
        losses[target.loss],
    )


TARGETS: dict[type[Spec], Callable[[TargetContext], Target]] = {
    CodeTargetSpec: _codes,
    FrameTargetSpec: _frames,
    IdTargetSpec: _ids,
    LatentTargetSpec: _latents,
    PatchTargetSpec: _patches,
    UnitTargetSpec: _units,
}
