"""Towers from their specs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from mmssl.backbones import NETWORKS
from mmssl.backbones.causal import CausalConvs, Pointwise, Trunk
from mmssl.backbones.dilated import DilatedConvs
from mmssl.backbones.recurrent import Recurrent
from mmssl.backbones.tokens import DenseGelu, ExtraTokens
from mmssl.backbones.transformer import Transformer
from mmssl.build.stems import channels, make_merge, make_stem
from mmssl.frontends import (
    SIGNALS,
    FactorisedPositions,
    SpectrumParams,
)
from mmssl.frontends.augment import SpectrumAugment
from mmssl.frontends.conv_positions import ConvPositions, ConvStackPositions
from mmssl.frontends.fixed_positions import SinusoidPositions
from mmssl.frontends.kaldi import Kaldi, KaldiParams, UtteranceFeatures
from mmssl.frontends.spectra import Spectrum
from mmssl.frontends.stems import ACTIVATIONS, CellMerge
from mmssl.quantizers import GumbelQuantizer, Quantizer, VectorQuantizer
from mmssl.specs import (
    BorrowedSpec,
    CausalConvSpec,
    ConvPositionSpec,
    ConvSpec,
    DilatedConvSpec,
    FixedPositionSpec,
    FrontendSpec,
    JointSpec,
    KaldiSpec,
    Modality,
    NearestSpec,
    Number,
    PointwiseSpec,
    ProsodySpec,
    QuantizerSpec,
    RecurrentSpec,
    RunSpec,
    S3DGSpec,
    SpectrumSpec,
    TowerSpec,
    Trainable,
    TransformerSpec,
    UtteranceSpec,
    ViewSpec,
)
from mmssl.towers import AnyTower, ConvTower, JointTower, Tower, entry_width
from mmssl.types import UserError


def need_view(spec: RunSpec, name: str, where: str) -> ViewSpec:
    """The view of that name.

    Raises:
        UserError: there is none.
    """
    if name not in spec.views:
        raise UserError(f"{where}: no view {name!r}; views are {', '.join(spec.views)}")
    return spec.views[name]


def shared_by(spec: RunSpec) -> tuple[Modality, ...]:
    """The modalities that run through the shared trunk, in a fixed order."""
    found = {t.modality for t in spec.towers.values() if t.backbone == "shared"}
    return tuple(sorted(found))


def make_trunk(
    spec: TransformerSpec, checkpointing: bool, modalities: Sequence[Modality], front: int = 0
) -> Transformer:
    """A transformer; `checkpointing` recomputes its layers in the backward pass.

    modalities: those that may have weights of their own. There is none for a modality that never
    comes by: an unused parameter would hang a distributed run. front: extra tokens before the grid.
    """
    own = {"kind", "own_norms", "own_ffn", "fresh", *Trainable.model_fields}
    return Transformer(
        **spec.model_dump(exclude=own),
        init=spec.fresh,
        norms_for=modalities if spec.own_norms else (),
        ffn_for=modalities if spec.own_ffn else (),
        ffn_layers=spec.own_ffn,
        relative_front=front,
        checkpointing=checkpointing,
    )


def make_quantizer(
    spec: QuantizerSpec, width: int, averaged: bool = False
) -> tuple[Quantizer, Number]:
    """A quantizer of latents of this width, and its temperature.

    averaged: its owner moves the averages of a codebook.

    Raises:
        UserError: there are averages that nobody would move.
    """
    if isinstance(spec, NearestSpec):
        if spec.ema and not averaged:
            raise UserError(
                "quantizer.ema: only tasks of kind `reconstruct` move averages of a codebook; set 0"
            )
        return VectorQuantizer(width, **spec.model_dump(exclude={"kind"})), 1.0
    options = spec.model_dump(exclude={"kind", "width", "temperature", "activation"})
    options["activation"] = ACTIVATIONS[spec.activation]()
    return GumbelQuantizer(width, spec.width, **options), spec.temperature


def make_towers(run: RunSpec, trunk: Transformer | None, vocab_size: int) -> dict[str, AnyTower]:
    """All towers; one that borrows tables is made after their owner."""
    made: dict[str, AnyTower] = {}
    for name in sorted(run.towers, key=lambda n: isinstance(run.towers[n].cut, BorrowedSpec)):
        made[name] = make_tower(name, run, trunk, vocab_size, made)
    return {name: made[name] for name in run.towers}


def make_tower(
    name: str,
    run: RunSpec,
    trunk: Transformer | None,
    vocab_size: int,
    others: Mapping[str, AnyTower],
) -> AnyTower:
    """Front-end, stem, positions and backbone of one modality.

    Raises:
        UserError: parts that do not fit together.
    """
    spec = run.towers[name]
    signal = make_signal(spec.frontend)
    if isinstance(spec.backbone, ConvSpec):
        if signal is None:
            raise UserError(f"towers.{name}.backbone: {spec.backbone.kind} cannot read text")
        if isinstance(spec.backbone, S3DGSpec) and spec.modality != "video":
            raise UserError(f"towers.{name}.backbone: s3dg reads video, not {spec.modality}")
        options = spec.backbone.model_dump(exclude={"kind"})
        network = NETWORKS[spec.backbone.kind](channels(spec), **options)
        return ConvTower(spec.modality, signal, network)
    encoder = _backbone(name, spec, run, trunk)
    width = entry_width(encoder)
    stem = make_stem(name, run, signal, width, vocab_size, others)
    merge = make_merge(name, spec, width)
    quantizer, temperature = _quantizer(name, spec, width)
    return Tower(
        spec.modality,
        signal,
        stem,
        _positions(name, spec, run, (signal, stem, merge), width),
        ExtraTokens(width, spec.globals, spec.registers),
        encoder,
        shared=spec.backbone == "shared",
        drop=spec.drop_tokens,
        pre=DenseGelu(width, width) if spec.pre else None,
        post=DenseGelu(encoder.width, spec.post) if spec.post else None,
        merge=merge,
        quantizer=quantizer,
        temperature=temperature,
    )


def _backbone(name: str, spec: TowerSpec, run: RunSpec, shared: Transformer | None) -> Trunk:
    if isinstance(spec.backbone, CausalConvSpec):
        return CausalConvs(**spec.backbone.model_dump(exclude={"kind"}))
    if isinstance(spec.backbone, DilatedConvSpec):
        return DilatedConvs(**spec.backbone.model_dump(exclude={"kind"}))
    if isinstance(spec.backbone, RecurrentSpec):
        options = spec.backbone.model_dump(exclude={"kind"})
        return Recurrent(**options | {"width_in": options["width_in"] or options["width"]})
    if isinstance(spec.backbone, PointwiseSpec):
        return Pointwise(spec.backbone.width, spec.backbone.kind == "relu")
    if isinstance(spec.backbone, TransformerSpec):
        front = len(spec.globals) + spec.registers
        checkpointing = run.train.checkpoint_activations
        return make_trunk(spec.backbone, checkpointing, (spec.modality,), front)
    if shared is None:
        raise UserError(
            f"towers.{name}.backbone: `shared`, but the run has no `shared` transformer"
        )
    return shared


def _quantizer(name: str, spec: TowerSpec, width: int) -> tuple[Quantizer | None, Number]:
    if spec.quantizer is None:
        return None, 1.0
    if spec.modality == "text":
        raise UserError(f"towers.{name}.quantizer: quantises signals; leave it out for text")
    quantizer, temperature = make_quantizer(spec.quantizer, width)
    if quantizer.width_out != width:
        raise UserError(
            f"towers.{name}.quantizer.width: {quantizer.width_out} for a backbone of width "
            f"{width}; make them equal"
        )
    return quantizer, temperature


def make_signal(spec: FrontendSpec | ProsodySpec) -> nn.Module | None:
    """A front-end; ids have none."""
    options = spec.model_dump(exclude={"kind", "utterance"})
    if isinstance(spec, KaldiSpec):
        return _whole(Kaldi(KaldiParams(**options)), spec.utterance)
    if isinstance(spec, SpectrumSpec):
        if spec.kind == "log_spectrogram":
            options = {k: v for k, v in options.items() if not k.startswith("mel_")}
        spectrum: Spectrum = SIGNALS[spec.kind](SpectrumParams(**options))
        return _whole(spectrum, spec.utterance)
    if spec.kind == "ids":
        return None
    signal: nn.Module = SIGNALS[spec.kind](**options)
    return signal


def _whole(spectrum: Spectrum | Kaldi, spec: UtteranceSpec | None) -> nn.Module:
    return spectrum if spec is None else UtteranceFeatures(spectrum, **spec.model_dump())


def make_augments(run: RunSpec, towers: Mapping[str, AnyTower]) -> dict[str, SpectrumAugment]:
    """What is done to the spectrograms of a tower's views in training, by tower.

    Raises:
        UserError: the tower makes no spectrogram, or its views differ in length.
    """
    found: dict[str, SpectrumAugment] = {}
    for name, spec in run.towers.items():
        if spec.augment is None:
            continue
        signal = towers[name].signal
        if not isinstance(signal, Spectrum | Kaldi | UtteranceFeatures) or channels(spec) > 1:
            raise UserError(
                f"towers.{name}.augment: changes spectrograms of one channel, but the front-end is "
                f"{spec.frontend.kind}; use log_mel, or `augment` of the views"
            )
        shapes = {data_shape(n, v) for n, v in run.views.items() if v.tower_name == name}
        if len(shapes) > 1:
            raise UserError(
                f"towers.{name}.augment: its views have lengths of {sorted(s for (s,) in shapes)} "
                "samples; give them one crop_s"
            )
        (samples,) = shapes.pop()
        shape = (samples, *signal.grid((samples,)))
        found[name] = SpectrumAugment(shape, **spec.augment.model_dump())
    return found


Chain = tuple[nn.Module | None, nn.Module, CellMerge | None]  # signal, stem, merge


def _positions(
    name: str, spec: TowerSpec, run: RunSpec, chain: Chain, width: int
) -> nn.Module | None:
    places = spec.positions
    if places.kind == "none":
        return None
    if isinstance(places, ConvPositionSpec):
        if places.layers == 1:
            return ConvPositions(width, places.kernel, places.groups)
        return ConvStackPositions(width, places.layers, places.kernel, places.groups)
    if isinstance(places, FixedPositionSpec):
        return SinusoidPositions(width, places.layout, places.dropout)
    grid = places.grid or _native_grid(name, run, chain)
    options = places.model_dump(exclude={"kind", "grid"})
    return FactorisedPositions(grid, width, **options)


def _native_grid(name: str, run: RunSpec, chain: Chain) -> Sequence[int]:
    """Token grid of the first view that the tower reads."""
    signal, stem, merge = chain
    for view_name, view in run.views.items():
        if view.tower_name == name:
            shape = data_shape(view_name, view)
            axes = shape if signal is None else signal.grid(shape)  # type: ignore[operator]
            grid: Sequence[int] = stem.grid(axes)  # type: ignore[operator]
            return grid if merge is None else merge.grid(grid)
    raise UserError(f"towers.{name}: no view reads this tower; give positions.grid or add a view")


def data_shape(name: str, view: ViewSpec) -> tuple[int, ...]:
    """Shape of one item of a view's data: (S,), (T, H, W, 3) or (N,).

    Raises:
        UserError: the view's length or size is open, so that nothing can be derived from it.
    """
    if view.modality == "text":
        return (view.length,)
    if view.crop_s <= 0:
        raise UserError(f"views.{name}.crop_s: give seconds, or give positions.grid in the tower")
    if view.modality == "audio":
        return (round(view.crop_s * view.hz),)
    if view.size <= 0:
        raise UserError(f"views.{name}.size: give pixels, or give positions.grid in the tower")
    frames = math.floor(view.crop_s * view.fps + 0.5)  # as frames are picked
    return (max(1, frames), view.size, view.size, 3)


def make_joint(name: str, spec: JointSpec, widths: Mapping[str, int], run: RunSpec) -> JointTower:
    """A tower over the tokens of several views.

    Raises:
        UserError: an unknown view, or weights per modality, which mixed tokens cannot have.
    """
    for view in spec.of:
        need_view(run, view, f"joints.{name}.of")
    if spec.backbone.own_norms or spec.backbone.own_ffn:
        raise UserError(
            f"joints.{name}.backbone: own_norms and own_ffn keep weights per modality, but a joint "
            "tower mixes modalities; leave them out"
        )
    trunk = make_trunk(spec.backbone, run.train.checkpoint_activations, ())
    return JointTower(spec.of, widths, ExtraTokens(trunk.width, spec.globals), trunk)
