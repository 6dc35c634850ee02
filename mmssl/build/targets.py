"""Targets of masked tasks from their specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from mmssl.backbones.transformer import Transformer
from mmssl.build.stems import channels
from mmssl.build.towers import data_shape, make_quantizer, make_trunk, need_view
from mmssl.frontends import FactorisedPositions
from mmssl.frontends.fixed_positions import SinusoidPositions
from mmssl.frontends.summed import EmbeddingTables, SummedEmbedding
from mmssl.heads.predict import PatchDecoder, TokenHead
from mmssl.heads.words import IdHead, SentenceHead, TiedHead
from mmssl.masking import (
    FrameAlteration,
    FrequencyBand,
    IdAlteration,
    MagnitudeNoise,
    SpecMasks,
    TimeSpans,
)
from mmssl.objectives.regression import scaled_square, smooth_l1
from mmssl.specs import (
    CodeTargetSpec,
    FixedPositionSpec,
    FramesSpec,
    FrameTargetSpec,
    IdTargetSpec,
    KaldiSpec,
    LatentTargetSpec,
    MaskedSpec,
    PatchTargetSpec,
    PredictiveTargetSpec,
    ReplacedTargetSpec,
    RunSpec,
    Spec,
    SpectrumSpec,
    TowerSpec,
    UnitTargetSpec,
    ViewSpec,
)
from mmssl.targets.base import Target
from mmssl.targets.codes import CodeTarget
from mmssl.targets.frames import FrameTarget, frame_head
from mmssl.targets.ids import IdTarget
from mmssl.targets.latents import LatentTarget, Loss
from mmssl.targets.patches import PatchTarget
from mmssl.targets.predictive import PredictiveTarget
from mmssl.targets.readers import Consistency, Reader, Transcription
from mmssl.targets.replaced import ReplacedTarget
from mmssl.targets.units import UnitTarget
from mmssl.towers import AnyTower, Tower
from mmssl.types import UserError


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of the tokenizer; empty without one.

    special: ids of the special pieces by name. begins: of every id, whether it begins a word.
    """

    size: int
    special: dict[str, int]
    begins: tuple[bool, ...]


@dataclass(frozen=True)
class TargetContext:
    """What the target of the masked task `name` is made for."""

    name: str
    task: MaskedSpec
    run: RunSpec
    tower: Tower
    vocabulary: Vocabulary
    towers: Mapping[str, AnyTower]

    @property
    def view(self) -> ViewSpec:
        """The view that is masked."""
        return self.run.views[self.task.view]

    @property
    def reads_ids(self) -> bool:
        """The view holds ids, of text or of a side-car."""
        return self.tower_spec.frontend.kind == "ids"

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


def word_begins(context: TargetContext) -> Tensor | None:
    """(V,) bool of every id, it begins a word; None for masks that do not ask.

    Raises:
        UserError: no text, or no tokenizer that tells.
    """
    if context.task.mask.rule != "ngrams":
        return None
    begins = context.vocabulary.begins
    if context.view.modality != "text" or not begins:
        raise UserError(
            f"tasks.{context.name}.mask.rule: `ngrams` needs a text view and a tokenizer that "
            "tells where words begin; set data.tokenizer, or use words"
        )
    return torch.tensor(begins)


def _alteration(context: TargetContext) -> IdAlteration:
    """How the ids of the masked view are altered."""
    task = context.task
    if not context.reads_ids:
        raise UserError(
            f"tasks.{context.name}.target: `{task.target.kind}` needs a text view or one with "
            f"`codes`, {task.view} is {context.view.modality}"
        )
    words = context.vocabulary
    return IdAlteration(words.size, words.special, task.mask.shares)


def _ids(context: TargetContext) -> Target:
    task, target, alter = context.task, context.task.target, _alteration(context)
    assert isinstance(target, IdTargetSpec)
    width = context.tower.width
    if target.head == "bert":
        head: IdHead | TiedHead = TiedHead(width, _tables(context))
    else:
        head = IdHead(width, task.hidden, context.vocabulary.size)
    segments = context.view.segments
    if target.sentence and (segments is None or segments.pairing == "single"):
        raise UserError(
            f"tasks.{context.name}.target.sentence: {task.view} has no pairs; set "
            f"views.{task.view}.segments.pairing to next or order"
        )
    sentence = SentenceHead(width) if target.sentence else None
    return IdTarget(head, alter, sentence)


def _tables(context: TargetContext) -> EmbeddingTables:
    """The tables that a tied head decodes with."""
    stem = context.tower.stem
    if not isinstance(stem, SummedEmbedding):
        raise UserError(
            f"tasks.{context.name}.target: a tied head needs the token table of the tower; set "
            f"towers.{context.view.tower_name}.cut.kind to summed"
        )
    return stem.tables


def _replaced(context: TargetContext) -> Target:
    target = context.task.target
    assert isinstance(target, ReplacedTargetSpec)
    where = f"tasks.{context.name}.target.view"
    tower = context.towers[need_view(context.run, target.view, where).tower_name]
    if not isinstance(tower, Tower) or tower.modality != "text" or tower is context.tower:
        raise UserError(
            f"{where}: {target.view} must be read by another transformer tower for text than "
            f"{context.task.view}, which the generator reads"
        )
    alter = _alteration(context)
    generator = IdTarget(TiedHead(context.tower.width, _tables(context)), alter)
    return ReplacedTarget(generator, TokenHead(tower.width, tower.width, 1), target.view)


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
            "cut is `wave_conv` or `frame_latents`"
        )
    given = target.quantizer
    quantizer, tau = (None, 1.0) if given is None else make_quantizer(given, latent)
    return CodeTarget(
        context.tower.width,
        latent,
        target.space,
        quantizer,
        target.negatives,
        (target.temperature, tau),
        target.dropout,
        target.negatives_of == "all",
        target.compare_in == "width",
        _readers(context, target, latent if quantizer is None else quantizer.width_out),
    )


def _readers(context: TargetContext, target: CodeTargetSpec, code: int) -> dict[str, Reader]:
    """What else reads the codes, which are `code` numbers wide."""
    readers: dict[str, Reader] = {}
    if target.decoder is not None:
        cell = channels(context.tower_spec) * prod(context.tower.cell)
        readers["consistency"] = Consistency(
            code, target.decoder.hidden, target.decoder.layers, cell
        )
    if target.transcripts is not None:
        where, field = f"tasks.{context.name}.target", target.transcripts.field
        if target.compare_in != "width":
            raise UserError(f"{where}.transcripts: replaces frames by codes; set compare_in: width")
        if field not in context.run.data.labels:
            raise UserError(
                f"{where}.transcripts.field: {field!r} is not read; add it to data.labels"
            )
        readers["transcripts"] = Transcription(
            context.tower.width, **target.transcripts.model_dump()
        )
    return readers


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
    width, cell = context.tower.width, _frame_cell(context)
    head = frame_head(width, task.hidden or width, cell)
    return FrameTarget(context.name, head, FrameAlteration(**parts))


def _frame_cell(context: TargetContext) -> int:
    """Numbers of a token of whole frames that are altered."""
    task = context.task
    spectrum = isinstance(context.tower_spec.frontend, SpectrumSpec | KaldiSpec)
    if not spectrum or task.mask.rule != "all":
        raise UserError(
            f"tasks.{context.name}.target: `{task.target.kind}` needs a spectrogram and mask.rule "
            "all"
        )
    return prod(context.tower.cell)


def _predictive(context: TargetContext) -> Target:
    target, task = context.task.target, context.task
    assert isinstance(target, PredictiveTargetSpec)
    return PredictiveTarget(
        context.name,
        task.view,
        (context.tower.width, target.latents, _frame_cell(context)),
        target.decoder,
        target.window,
        target.ridge,
        FrameAlteration(masks=SpecMasks(**target.masks.model_dump())),
    )


def _latents(context: TargetContext) -> Target:
    target, tower = context.task.target, context.tower
    assert isinstance(target, LatentTargetSpec)
    if not isinstance(tower.trunk, Transformer):
        raise UserError(
            f"tasks.{context.name}.target: a teacher needs a transformer; the backbone of "
            f"towers.{context.view.tower_name} is another"
        )
    if target.layers > tower.trunk.layers:
        raise UserError(
            f"tasks.{context.name}.target.layers: {target.layers} of {tower.trunk.layers} layers; "
            "give no more than the backbone has"
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
        _alteration(context) if context.reads_ids else None,
    )


TARGETS: dict[type[Spec], Callable[[TargetContext], Target]] = {
    CodeTargetSpec: _codes,
    FrameTargetSpec: _frames,
    IdTargetSpec: _ids,
    LatentTargetSpec: _latents,
    PatchTargetSpec: _patches,
    PredictiveTargetSpec: _predictive,
    ReplacedTargetSpec: _replaced,
    UnitTargetSpec: _units,
}
