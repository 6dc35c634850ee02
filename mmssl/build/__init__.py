"""Specs to modules: the only reader of the part tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from mmssl.backbones.transformer import Transformer
from mmssl.build.policy import policy_of
from mmssl.build.targets import Vocabulary
from mmssl.build.tasks import TaskBuilder
from mmssl.build.towers import (
    data_shape,
    make_augments,
    make_joint,
    make_towers,
    make_trunk,
    shared_by,
)
from mmssl.dist import MaskedSyncBatchNorm
from mmssl.model import Model
from mmssl.quantizers import GumbelQuantizer, VectorQuantizer
from mmssl.specs import (
    KaldiSpec,
    PASESpec,
    RunSpec,
    SincNetSpec,
    SpectrumSpec,
    TowerSpec,
    ViewSpec,
)
from mmssl.types import UserError
from mmssl.views import mel

__all__ = ["build_model", "data_shape"]


def build_model(
    spec: RunSpec,
    vocab_size: int = 0,
    special: Mapping[str, int] | None = None,
    begins: Sequence[bool] = (),
) -> Model:
    """The model of a run, with fresh weights from torch's global generator.

    vocab_size, special, begins: size and special ids of the tokenizer, needed by text towers, and
    which ids begin a word, needed by masks of whole words.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    _check_names(spec)
    _check_windows(spec)
    vocabulary = Vocabulary(vocab_size, dict(special or {}), tuple(begins))
    checkpointing = spec.train.checkpoint_activations
    trunk = make_trunk(spec.shared, checkpointing, shared_by(spec)) if spec.shared else None
    towers = make_towers(spec, trunk, vocab_size)
    tower_of = {name: v.tower_name for name, v in spec.views.items()}
    widths = {view: towers[tower].width for view, tower in tower_of.items()}
    joints = {name: make_joint(name, t, widths, spec) for name, t in spec.joints.items()}
    make = TaskBuilder(spec, towers, joints, widths, vocabulary)
    tasks = {name: make(name, t) for name, t in spec.tasks.items()}
    model = Model(spec, towers, joints, trunk, tasks, make_augments(spec, towers))
    if checkpointing and not any(isinstance(part, Transformer) for part in model.modules()):
        raise UserError(
            "train.checkpoint_activations: only layers of transformers can be computed again, and "
            f"{spec.name} has none; set false"
        )
    if spec.train.chunk:
        _check_chunks(towers)
    model.set_policy(policy_of(spec, model))
    return model


def _check_chunks(towers: Mapping[str, nn.Module]) -> None:
    for name, tower in towers.items():
        kinds = {type(part) for part in tower.modules()}
        if any(issubclass(kind, MaskedSyncBatchNorm) for kind in kinds):
            raise UserError(
                f"train.chunk: the tower {name!r} normalises over the whole batch, which a part of "
                "it cannot; set 0"
            )
        if any(issubclass(kind, GumbelQuantizer | VectorQuantizer) for kind in kinds):
            raise UserError(
                f"train.chunk: the quantizer of the tower {name!r} counts its codes over the "
                "batch; set 0"
            )


def _check_names(spec: RunSpec) -> None:
    for name, view in spec.views.items():
        tower = view.tower_name
        found = spec.towers.get(tower)
        if found is None:
            raise UserError(
                f"views.{name}.tower: no tower {tower!r}; towers are {', '.join(spec.towers)}"
            )
        if found.modality != view.modality:
            raise UserError(
                f"views.{name}: tower {tower!r} reads {found.modality}, the view is {view.modality}"
            )
        _check_ids(name, tower, spec)
        _check_mel(name, view, found)
        spectrum = isinstance(found.frontend, SpectrumSpec | KaldiSpec)
        part = (
            found.backbone if isinstance(found.backbone, SincNetSpec | PASESpec) else found.frontend
        )
        spectrum = spectrum or part is found.backbone
        rate = part.sample_rate if spectrum else view.hz  # type: ignore[union-attr]
        if view.modality == "audio" and rate != view.hz:
            raise UserError(
                f"views.{name}.hz: {view.hz} Hz, but sample_rate of towers.{tower} is {rate} "
                "Hz; make them equal"
            )


def _check_windows(spec: RunSpec) -> None:
    """A largest distance is one of several windows, which it leaves room for."""
    for name, view in spec.views.items():
        if view.within_s is None:
            continue
        family = view.window.rpartition(".")[0]
        members = [v for v in spec.views.values() if v.window.rpartition(".")[0] == family]
        crops_s: dict[str, float] = {}
        for v in members if family else []:
            crops_s[v.window] = max(v.crop_s, crops_s.get(v.window, 0.0))
        if len(crops_s) < 2 or min(crops_s.values()) <= 0:
            raise UserError(
                f"views.{name}.within_s: is a distance of windows NAME.1, NAME.2 ... that have a "
                f"`crop_s`, of which `{view.window}` is none; name two of them, or leave it out"
            )
        least = sum(crops_s.values()) - min(crops_s.values())
        if view.within_s < least:
            raise UserError(
                f"views.{name}.within_s: {view.within_s:g} s, but windows beside each other start "
                f"up to {least:g} s apart; raise it, or shorten their `crop_s`"
            )


def _check_mel(name: str, view: ViewSpec, tower: TowerSpec) -> None:
    """What changes mel energies has a front-end that gives them, and the spectrogram to itself."""
    kinds, front = [augment.kind for augment in mel.chosen(view.augment)], tower.frontend
    where = f"towers.{view.tower_name}"
    if not kinds:
        return
    if view.crop_s <= 0:
        raise UserError(f"views.{name}.crop_s: {kinds[0]} needs seconds")
    if front.kind != "log_mel" or front.log != "ln_eps":
        raise UserError(
            f"views.{name}.augment: {kinds[0]} changes mel energies, which {where}.frontend must "
            "give as kind log_mel with log ln_eps"
        )
    if tower.augment is not None:
        raise UserError(
            f"views.{name}.augment: {kinds[0]} would be undone by {where}.augment, which begins "
            "with the plain spectrogram; leave one of them out"
        )


def _check_ids(name: str, tower: str, spec: RunSpec) -> None:
    """Ids go into towers that read ids, of one vocabulary each."""
    view, reads = spec.views[name], spec.towers[tower].frontend.kind
    if (view.modality == "text" or view.codes is not None) != (reads == "ids"):
        raise UserError(
            f"views.{name}: the front-end of tower {tower!r} reads {reads}; `ids` is for text and "
            "for views with `codes`, and these need it"
        )
    first = next(v for v in spec.views.values() if v.tower_name == tower)
    if view.codes != first.codes:
        raise UserError(
            f"views.{name}.codes: another view of tower {tower!r} has other codes; make them equal"
        )
