"""Stems: what cuts a front-end's signal into tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mmssl.frontends import (
    STEMS,
    TEXTS,
    SpectrumStack,
)
from mmssl.frontends.frame_stem import FrameStem
from mmssl.frontends.kaldi import Kaldi, UtteranceFeatures
from mmssl.frontends.spectra import Spectrum
from mmssl.frontends.stems import CellMerge
from mmssl.frontends.summed import EmbeddingTables, SummedEmbedding
from mmssl.frontends.video import CHANNELS
from mmssl.frontends.wave_stem import WaveStem
from mmssl.specs import (
    BorrowedSpec,
    EmbeddingSpec,
    FrameLatentsSpec,
    FramesSpec,
    PatchSpec,
    RunSpec,
    StemSpec,
    SummedSpec,
    TowerSpec,
    WaveConvSpec,
)
from mmssl.towers import AnyTower, Tower
from mmssl.types import UserError


def channels(spec: TowerSpec) -> int:
    """Channels of the signal that a tower's stem reads."""
    if isinstance(spec.frontend, FramesSpec):
        return CHANNELS[spec.frontend.channels]
    return SpectrumStack.channels if spec.frontend.kind == "spectrum_stack" else 1


def make_stem(
    name: str,
    run: RunSpec,
    signal: nn.Module | None,
    width: int,
    vocab_size: int,
    others: Mapping[str, AnyTower],
) -> nn.Module:
    """The stem of a tower whose front-end makes this signal.

    width: of the cells. others: towers made before, for a stem that borrows tables.

    Raises:
        UserError: a cut that does not fit the front-end, the tokenizer or the backbone.
    """
    spec = run.towers[name]
    if isinstance(spec.cut, BorrowedSpec):
        return _borrowed(name, spec.cut, width, others)
    if isinstance(spec.cut, FrameLatentsSpec):
        return _frame_stem(name, spec.cut, signal, width)
    codes = next((v.codes for v in run.views.values() if v.tower_name == name), None)
    return _own_stem(name, spec, width, vocab_size if codes is None else codes.vocabulary)


def _text_stem(
    name: str, spec: TowerSpec, cut: EmbeddingSpec | SummedSpec, width: int, vocab_size: int
) -> nn.Module:
    if isinstance(cut, SummedSpec) and cut.vocabulary:
        vocab_size = _agreed(name, cut.vocabulary, vocab_size)
    if vocab_size <= 0:
        raise UserError(f"towers.{name}: a text tower needs a tokenizer; set data.tokenizer")
    if isinstance(cut, SummedSpec):
        if spec.positions.kind != "none":
            raise UserError(f"towers.{name}.positions: a `summed` cut has its own; set kind: none")
        options = cut.model_dump(exclude={"kind", "vocabulary", "width"})
        return SummedEmbedding(EmbeddingTables(vocab_size, cut.width or width, **options), width)
    if cut.kind == "embedding":
        stem: nn.Module = TEXTS["embedding"](vocab_size, width)
        return stem
    table = vector_table(cut.table) if cut.table else None
    generator = torch.Generator().manual_seed(0)
    stem = TEXTS["frozen"](vocab_size, width, cut.table_width, table, generator)
    return stem


def _agreed(name: str, vocabulary: int, vocab_size: int) -> int:
    """The size that a tower says its vocabulary has, which a tokenizer must have, too."""
    if vocab_size not in (0, vocabulary):
        raise UserError(
            f"towers.{name}.cut.vocabulary: {vocabulary} ids, the tokenizer has {vocab_size}; set "
            "data.tokenizer to the one that the tower was made with"
        )
    return vocabulary


def _own_stem(name: str, spec: TowerSpec, width: int, vocab_size: int) -> nn.Module:
    cut = spec.cut
    stem: nn.Module
    if isinstance(cut, EmbeddingSpec | SummedSpec):
        return _text_stem(name, spec, cut, width, vocab_size)
    if isinstance(cut, PatchSpec):
        stem = STEMS["patches"](cut.patch, width, channels(spec), cut.project)
        return stem
    if isinstance(cut, WaveConvSpec):
        if spec.frontend.kind != "waveform":
            raise UserError(f"towers.{name}.cut: `wave_conv` needs `frontend: {{kind: waveform}}`")
        return WaveStem(width, **cut.model_dump(exclude={"kind"}))
    if isinstance(cut, StemSpec):
        options = cut.model_dump(exclude={"kind", "merge", "merge_time"})
        time = {key: options.pop(key) for key in ("fold", "temporal_kernel", "temporal_stride")}
        if spec.modality == "video":
            stem = STEMS["video_conv"](width, **options, **time, in_channels=channels(spec))
            return stem
        rank = 1 if spec.frontend.kind == "waveform" else 2
        stem = STEMS["conv"](width, **options, in_channels=channels(spec), rank=rank)
        return stem
    raise UserError(f"towers.{name}.cut: `whole` needs a convolutional backbone")


def _frame_stem(
    name: str, cut: FrameLatentsSpec, signal: nn.Module | None, width: int
) -> FrameStem:
    if not isinstance(signal, Spectrum | Kaldi | UtteranceFeatures):
        raise UserError(
            f"towers.{name}.cut: `frame_latents` reads a spectrogram; set frontend.kind to "
            "log_mel, log_spectrogram or kaldi"
        )
    return FrameStem(width, signal.bands, **cut.model_dump(exclude={"kind"}))


def _borrowed(
    name: str, cut: BorrowedSpec, width: int, others: Mapping[str, AnyTower]
) -> SummedEmbedding:
    owner = others.get(cut.of)
    if not isinstance(owner, Tower) or not isinstance(owner.stem, SummedEmbedding):
        raise UserError(
            f"towers.{name}.cut.of: {cut.of!r} is no tower with a `summed` cut; there are "
            f"{', '.join(others) or 'none'}"
        )
    return SummedEmbedding(owner.stem.tables, width, borrowed=True)


def vector_table(path: str) -> torch.Tensor:
    """Rows of vectors in a file.

    Raises:
        UserError: no such file, or none of vectors.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such table of vectors; give a safetensors file with the key `weight`"
        )
    tensors = load_file(path)
    if "weight" not in tensors:
        raise UserError(f"{path}: no key `weight`, only {', '.join(tensors)}")
    return tensors["weight"]


def make_merge(name: str, spec: TowerSpec, width: int) -> CellMerge | None:
    """What joins neighbouring cells of a video's stem, None where a tower keeps them.

    Raises:
        UserError: the tower does not read video.
    """
    if not isinstance(spec.cut, StemSpec) or spec.cut.merge * spec.cut.merge_time == 1:
        return None
    if spec.modality != "video":
        raise UserError(
            f"towers.{name}.cut: merge and merge_time are for video only, "
            f"the tower reads {spec.modality}"
        )
    return CellMerge(width, spec.cut.merge_time, spec.cut.merge)
