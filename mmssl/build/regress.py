"""Tasks of dense regression from their specs."""

from __future__ import annotations

from collections.abc import Mapping

from mmssl.build.towers import make_signal, need_view
from mmssl.heads.regress import FrameDecoder, WaveDecoder
from mmssl.specs import RegressSpec, RunSpec, WaveDecoderSpec
from mmssl.targets.signals import Standardize
from mmssl.tasks.base import Task
from mmssl.tasks.regress import Regress
from mmssl.towers import AnyTower
from mmssl.types import UserError


def make_regress(
    name: str, task: RegressSpec, run: RunSpec, towers: Mapping[str, AnyTower]
) -> Task:
    """A regression of what a signal of a view holds.

    Raises:
        UserError: the view is no audio, or tokens and frames do not fit together.
    """
    where = f"tasks.{name}"
    view = need_view(run, task.view, f"{where}.view")
    if view.modality != "audio" or view.codes is not None:
        raise UserError(f"{where}.view: {task.view} has no waveform; name an audio view")
    rate = getattr(task.signal, "sample_rate", view.hz)
    if rate != view.hz:
        raise UserError(
            f"{where}.signal.sample_rate: {rate} Hz, but views.{task.view}.hz is {view.hz}; make "
            "them equal"
        )
    tower = towers[view.tower_name]
    token = round(view.hz / tower.token_rate(view.hz))  # samples
    signal = make_signal(task.signal)
    assert signal is not None  # ids are no signal of a regression
    if isinstance(task.decoder, WaveDecoderSpec):
        if token != task.decoder.samples:
            raise UserError(
                f"{where}.decoder.strides: make {task.decoder.samples} samples of a token, but "
                f"tokens of towers.{view.tower_name} are {token} apart; change the strides"
            )
        wave = WaveDecoder(tower.width, **task.decoder.model_dump(exclude={"kind"}))
        standard = Standardize(1) if task.standardize else None
        return Regress(task.view, signal, 0, wave, task.error, standard, task.weight)
    hop: int = signal.params.hop  # type: ignore[union-attr, assignment]
    if token % hop:
        raise UserError(
            f"{where}.signal.hop: {hop} samples, but tokens of towers.{view.tower_name} are "
            f"{token} apart; use {token}, or a part of it"
        )
    ratio = token // hop
    bands: int = signal.bands * getattr(signal, "channels", 1)  # type: ignore[operator, assignment]
    # the frames of a token lie evenly around its centre
    first = tower.first_centre() * ratio - (ratio - 1) / 2
    shift = round(signal.first_centre - first)  # type: ignore[operator, arg-type]
    frames = FrameDecoder(tower.width, bands, ratio, task.decoder.hidden)
    standard = Standardize(bands) if task.standardize else None
    return Regress(task.view, signal, shift, frames, task.error, standard, task.weight)
