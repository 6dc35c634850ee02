"""Tasks that rebuild a signal, from their specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from mmssl.build.stems import channels
from mmssl.build.towers import data_shape, make_quantizer, need_view
from mmssl.heads.decode import ConvDecoder, Decoder, SequenceDecoder, WaveNet
from mmssl.quantizers import Quantizer
from mmssl.specs import (
    ConvDecoderSpec,
    Number,
    ReconstructSpec,
    RunSpec,
    SequenceDecoderSpec,
    SlicesSpec,
    WaveNetSpec,
)
from mmssl.tasks.reconstruct import Reconstruct
from mmssl.towers import AnyTower, ConvTower, Tower
from mmssl.types import UserError


def make_reconstruct(
    name: str,
    task: ReconstructSpec,
    run: RunSpec,
    encoders: tuple[Mapping[str, AnyTower], Mapping[str, int]],
    check_pool: Callable[[str, str, str], None],
) -> Reconstruct:
    """A task that rebuilds; encoders: towers by name, widths by view.

    check_pool: refuses a pooling that a view does not have.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    where, (towers, widths) = f"tasks.{name}", encoders
    view = need_view(run, task.view, f"{where}.view")
    tower, width = towers[view.tower_name], widths[task.view]
    if tower.signal is None:
        raise UserError(f"{where}.view: ids are no signal to rebuild; name an audio or video view")
    if task.pool:
        check_pool(f"{where}.pool", task.view, task.pool)
    axes: tuple[int, ...] = tower.signal.grid(data_shape(task.view, view))  # type: ignore[operator]
    _check_parts(where, task, axes)
    if task.slices is not None:
        check_slices(f"{where}.slices", tower, axes, task.slices.span, task.slices.frames)
        width *= task.slices.count - 1 if task.slices.read == "around" else 1
    quantizer: Quantizer | None = None
    temperature: Number = 1.0
    if task.quantizer is not None:
        quantizer, temperature = make_quantizer(task.quantizer, width, averaged=True)
        width = quantizer.width_out
    if isinstance(task.decoder, WaveNetSpec):
        decoder: Decoder = _wavenet(where, task.decoder, run, tower, width)
    elif isinstance(task.decoder, SequenceDecoderSpec):
        features = channels(run.towers[view.tower_name]) * prod(axes[1:])
        decoder = SequenceDecoder(width, features, task.decoder.cell)
    else:
        colours = channels(run.towers[view.tower_name])
        decoder = _mirror(where, task.decoder, task.slices, colours, axes, width)
    return Reconstruct(name, task, decoder, quantizer, temperature)


def check_slices(where: str, tower: AnyTower, axes: Sequence[int], span: int, frames: int) -> None:
    """Refuse slices that a view of a signal of these axes does not hold, or a tower cannot read.

    Raises:
        UserError: they do not fit.
    """
    if len(axes) != 2 or axes[0] < span:
        raise UserError(
            f"{where}: spans {span} frames of a spectrogram, the view has "
            f"{' x '.join(map(str, axes))}; use a longer crop_s, fewer or shorter slices, and a "
            "spectrogram as front-end"
        )
    network = tower.network if isinstance(tower, ConvTower) else tower.stem
    try:
        network.grid((frames, *axes[1:]))  # type: ignore[operator]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_parts(where: str, task: ReconstructSpec, axes: Sequence[int]) -> None:
    """Which decoder reads what."""
    kind = task.decoder.kind
    needs = {
        "conv": ("slices and a pool", task.slices is not None and bool(task.pool)),
        "sequence": (
            "a pool, a view with frames (a spectrogram) and no slices",
            bool(task.pool) and task.slices is None and len(axes) > 1,
        ),
        "wavenet": (
            "tokens of a waveform, no slices and no pool",
            not task.pool and task.slices is None and len(axes) == 1,
        ),
    }
    what, fits = needs[kind]
    if not fits:
        raise UserError(f"{where}.decoder: `{kind}` needs {what}; change these, or the decoder")


def _mirror(
    where: str,
    spec: ConvDecoderSpec,
    slices: SlicesSpec | None,
    colours: int,
    axes: Sequence[int],
    width: int,
) -> ConvDecoder:
    assert slices is not None  # `_check_parts`
    shape = (slices.frames, axes[1])
    if min(shape) >> len(spec.channels) == 0:
        raise UserError(
            f"{where}.decoder.channels: slices of {shape[0]} x {shape[1]} cells cannot be halved "
            f"{len(spec.channels)} times; use fewer, or longer slices"
        )
    said = 1 if slices.read == "around" else slices.count - 1
    return ConvDecoder(width, spec.channels, said * colours, shape)


def _wavenet(where: str, spec: WaveNetSpec, run: RunSpec, tower: AnyTower, width: int) -> WaveNet:
    if not isinstance(tower, Tower):
        raise UserError(
            f"{where}.decoder: `wavenet` reads tokens in time; use a tower with a cut and a "
            "backbone behind it, kind identity if there is none"
        )
    options = spec.model_dump(exclude={"kind", "speaker"})
    if spec.speaker is None:
        return WaveNet(width, tower.cell[0], **options)
    if spec.speaker.field not in run.data.labels:
        raise UserError(
            f"{where}.decoder.speaker.field: {spec.speaker.field!r} is not read; add it to "
            "data.labels"
        )
    speakers = spec.speaker.field, spec.speaker.classes
    return WaveNet(width, tower.cell[0], **options, speakers=speakers)
