"""Tasks of dense regression from their specs."""

from __future__ import annotations

from collections.abc import Mapping

from mmssl.build.towers import make_signal, need_view
from mmssl.frontends.prosody import Prosody
from mmssl.heads.regress import FrameDecoder, WaveDecoder
from mmssl.specs import ProsodySpec, RegressSpec, RunSpec, WaveDecoderSpec
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
    width = tower.width
    if isinstance(task.decoder, WaveDecoderSpec):
        if token != task.decoder.samples:
            raise UserError(
                f"{where}.decoder.strides: make {task.decoder.samples} samples of a token, but "
                f"tokens of {view.tower_name} are {token} apart; change the strides"
            )
        decoder = WaveDecoder(width, **task.decoder.model_dump(exclude={"kind"}))
        signal, shift, bands = make_signal(task.signal), 0, 1
        return Regress(task.view, signal, shift, decoder, task.error, None, task.weight)
    if isinstance(task.signal, ProsodySpec):
        signal = Prosody(**task.signal.model_dump(exclude={"kind"}))
    else:
        signal = make_signal(task.signal)
    ...
