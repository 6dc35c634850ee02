"""What label_shards makes labels of: MFCCs, the layers of a trained tower, its quantiser's codes.

Letters in shapes: P items of a view, T frames, D width, G groups of codes, F coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmssl.data.sidecars import Source
from mmssl.eval.load import load_model
from mmssl.files import sha256
from mmssl.model import Model
from mmssl.specs import DataSpec, RunSpec, ViewSpec
from mmssl.towers import AnyTower, Tower, time_steps
from mmssl.train import checkpoint
from mmssl.types import UserError, ViewBatch

Floats = NDArray[np.float32]

MFCCS = ("mfcc", "mfcc_cmvn")

_CHUNK_S = 100.0  # of a clip are encoded at a time, as HuBERT's tool does at 16 kHz
_CONTEXT_S = 1.0  # behind a chunk, so that its last frame sees what it would see in the whole clip
_SHORT_S = 0.1  # a clip below may be shorter than a model's first window: then it has no label


class FrameSource(Protocol):
    """Makes frame features of whole clips, one clip at a time: no clip depends on another.

    view, data: how clips are read.
    """

    source: Source
    width: int
    view: ViewSpec
    data: DataSpec

    def frames(self, view: ViewBatch) -> Floats:
        """(T, D) features of a view of one item; T may be 0."""


def frame_source(
    features: str, tower: str = "", layer: int = 0, codes: bool = False
) -> FrameSource:
    """`mfcc`, `mfcc_cmvn`, or what a layer, or the quantiser, of a run's tower makes of the audio.

    Raises:
        UserError: see `TowerFrames` and `TowerCodes`; also a layer, tower or codes of MFCCs.
    """
    if features in MFCCS:
        if layer or tower or codes:
            raise UserError(
                f"--features {features} has no --layer, --tower and --codes; leave them out"
            )
        return Mfcc(features)
    if not codes:
        return TowerFrames(features, tower, layer)
    if layer:
        raise UserError("--codes are those of the tower's quantiser; leave --layer out")
    return TowerCodes(features, tower)


class Mfcc:
    """HuBERT's first features: Kaldi's 13 MFCCs (25 ms, every 10 ms, without energy) with first and
    second differences, 39 numbers at 100 Hz. As `mfcc_cmvn` each has zero mean and unit variance
    over a clip, which takes out much of voice and channel: for few speakers.
    """

    hz, window = 16000, 400
    width = 39
    view = ViewSpec(modality="audio", hz=hz)
    data = DataSpec()

    def __init__(self, name: str = "mfcc") -> None:
        self.source = Source(name, 100.0, first_centre_s=0.0125)
        self._normalised = name == "mfcc_cmvn"

    def frames(self, view: ViewBatch) -> Floats:
        """(T, 39) features; none for less than one window."""
        from torchaudio.compliance import kaldi
        from torchaudio.functional import compute_deltas

        if view.data.shape[1] < self.window:
            return np.empty((0, self.width), np.float32)
        first_FT = kaldi.mfcc(view.data, sample_frequency=self.hz, use_energy=False).T
        second_FT = compute_deltas(first_FT)
        features_FT = torch.cat([first_FT, second_FT, compute_deltas(second_FT)])
        if self._normalised:
            deviation_F1, mean_F1 = torch.std_mean(features_FT, 1, correction=0, keepdim=True)
            features_FT = (features_FT - mean_F1) / (deviation_F1 + 1e-5)
        return features_FT.T.contiguous().numpy()


class TowerFrames:
    """Outputs of a trained tower, or of one of its layers; cells of one time step are averaged."""

    def __init__(self, run: str | Path, tower: str = "", layer: int = 0) -> None:
        """Load the run.

        Raises:
            UserError: no complete checkpoint, no such tower or layer, or no view that it reads.
        """
        model, spec, _ = load_model(run)
        self._name, self._layer = _audio_tower(spec, tower), layer
        self.view = _whole_view(spec, self._name)
        self.data = spec.data.model_copy(update={"frame_labels": {}, "labels": []})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tower, self._block = _parts(model.to(device), self._name, layer)
        seconds = max(1.0, self.view.crop_s)
        sample, rate = self._encode(self._silence(seconds, device))
        self.width, self._rate = sample[0].shape[1], rate
        folder = checkpoint.find(run, "best")
        averaged = (folder / checkpoint.EMA).is_file()
        self.source = Source(
            features=f"{spec.name}/{self._name}",
            rate_hz=rate,
            first_centre_s=self._tower.first_centre() / rate,
            layer=layer,
            checkpoint_sha256=sha256(folder / (checkpoint.EMA if averaged else checkpoint.WEIGHTS)),
        )

    def _silence(self, seconds: float, device: torch.device) -> ViewBatch:
        samples = round(seconds * self.view.hz)
        one = torch.zeros(1, dtype=torch.int64, device=device)
        return ViewBatch(
            modality="audio",
            data=torch.zeros(1, samples, device=device),
            lengths_P=one + samples,
            rows_P=one,
            slots_P=one,
            seeds_P=one,
            start_s_P=one.float(),
            present_BL=torch.ones(1, 1, dtype=torch.bool, device=device),
            rate=float(self.view.hz),
        )

    def frames(self, view: ViewBatch) -> Floats:
        """(T, D) features of all chunks of a clip."""
        device = next(self._tower.parameters()).device
        per_chunk = math.floor(_CHUNK_S * self._rate)
        step = round(per_chunk / self._rate * view.rate)
        parts = [np.empty((0, self.width), np.float32)]
        for first in range(0, view.data.shape[1], step):
            data = view.data[:, first : first + step + round(_CONTEXT_S * view.rate)].to(device)
            lengths = torch.full((1,), data.shape[1], device=device)
            whole = first + step >= view.data.shape[1]
            encoded = self._chunk(replace(view, data=data, lengths_P=lengths))
            parts.append(encoded if whole else encoded[:per_chunk])
        return np.concatenate(parts)

    def _chunk(self, view: ViewBatch) -> Floats:
        try:
            features, _ = self._encode(view)
        except UserError:
            if view.data.shape[1] < _SHORT_S * view.rate:
                return np.empty((0, self.width), np.float32)
            raise
        out: Floats = features[0].float().cpu().numpy()
        return out

    def _encode(self, view: ViewBatch) -> tuple[list[Tensor], float]:
        return encode_frames(view, self._tower, self._block)


class TowerCodes(TowerFrames):
    """Entries that a trained tower's quantiser chooses, (T, G) whole numbers."""

    def __init__(self, run: str | Path, tower: str = "") -> None:
        """Load the run.

        Raises:
            UserError: as `TowerFrames`; or the tower has no quantiser.
        """
        super().__init__(run, tower)
        self.source = replace(self.source, features=f"{self.source.features}/codes")

    @torch.inference_mode()
    def _encode(self, view: ViewBatch) -> tuple[list[Tensor], float]:
        tokens = self._tower.encode(view, 1.0)
        if tokens.codes is None:
            raise UserError(f"--codes: the tower {self._name} has no quantiser")
        pairs = zip(tokens.codes.ids_PNG, tokens.pad_PN, strict=True)
        return [ids[~pad] for ids, pad in pairs], tokens.rate_hz


@torch.inference_mode()
def encode_frames(
    view: ViewBatch, tower: AnyTower, block: nn.Module | None = None
) -> tuple[list[Tensor], float]:
    """Features (T, D) of every item of a view, and their rate in Hz.

    block: the layer of the tower's transformer whose output is taken, before any final norm; None
    takes the tower's own output.
    """
    with _listening(block) as heard:
        tokens = tower.encode(view, 1.0)
    if block is not None:
        assert isinstance(tower, Tower)  # `_parts` refuses layers of other towers
        _, x_PND = tower.extra.split(heard[0], tower.extra.names)
        tokens = replace(tokens, x_PND=x_PND)
    x_PTD, pad_PT = time_steps(tokens)
    return [x[~pad] for x, pad in zip(x_PTD, pad_PT, strict=True)], tokens.rate_hz


@contextmanager
def _listening(block: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a module returns while inside."""
    heard: list[Tensor] = []
    if block is None:
        yield heard
        return
    handle = block.register_forward_hook(lambda _, __, out: heard.append(out))
    try:
        yield heard
    finally:
        handle.remove()


def _audio_tower(spec: RunSpec, asked: str) -> str:
    names = [name for name, tower in spec.towers.items() if tower.modality == "audio"]
    if asked in names or (not asked and len(names) == 1):
        return asked or names[0]
    raise UserError(
        f"--tower {asked or '(none)'}: the run {spec.name} has the audio towers "
        f"{', '.join(names) or '(none)'}; name one of them"
    )


def _whole_view(spec: RunSpec, tower: str) -> ViewSpec:
    """The first view that the tower reads, without crop and augmentation."""
    for view in spec.views.values():
        if view.tower_name == tower:
            return view.model_copy(update={"crop_s": 0.0, "window": "clip", "augment": []})
    raise UserError(f"run {spec.name}: no view is read by the tower {tower}")


def _parts(model: Model, name: str, layer: int) -> tuple[AnyTower, nn.Module | None]:
    """The tower, and its layer unless that is 0."""
    tower: AnyTower = model.towers[name]  # type: ignore[assignment]
    if layer == 0:
        return tower, None
    blocks: Sequence[nn.Module] = []
    if isinstance(tower, Tower):
        trunk = model.trunk if tower.own_trunk is None else tower.own_trunk
        blocks = trunk.blocks  # type: ignore[union-attr,assignment]
    if not 1 <= layer <= len(blocks):
        raise UserError(
            f"--layer {layer}: the tower {name} has {len(blocks)} transformer layers; give 0 for "
            "its output or a number up to that"
        )
    return tower, blocks[layer - 1]
