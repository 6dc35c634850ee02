"""The published methods from their own YAML files, at a size that fits a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mmssl import config
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY, fake_batch
from mmssl.model import Model
from mmssl.specs import (
    Audio2VecSpec,
    BYOLASpec,
    CausalConvSpec,
    DilatedConvSpec,
    GumbelSpec,
    PASESpec,
    PointwiseSpec,
    ReconstructSpec,
    RecurrentSpec,
    ResNetSpec,
    RunSpec,
    S3DGSpec,
    SincNetSpec,
    SummedSpec,
    TowerSpec,
    TransformerSpec,
)
from mmssl.types import Batch, Tokens, ViewBatch

SAMPLES, FRAMES, SIDE = 6400, 8, 32
# overrides of tiny runs that read frames, to read the waveform as their methods do
WAVE_TOWER = {
    "hubert_it1_tiny": ["towers.audio.use=wave_tiny"],
    "hubert_it2_tiny": ["towers.audio.use=wave_tiny"],
    "wavlm_base_tiny": ["towers.audio.use=wave_tiny"],
    "data2vec_audio_tiny": [
        "towers.audio={use: wave_tiny, cut: {norm: layer, gradient_scale: 1.0, dropout: 0.0}}",
        "towers.audio.positions={kind: conv, layers: 3, kernel: 9, groups: 4, layout: null}",
    ],
}
LATENTS = {"wave_conv": "channels", "frame_latents": "latent"}


def small(name: str, *overrides: str) -> RunSpec:
    """A method at width 16, one layer, no dropout, on short and small views.

    Everything else is as in the file; `overrides` come last.
    """
    spec = config.load(name)
    return config.load(name, [*shrinking(spec), *overrides])


def shrinking(spec: RunSpec) -> list[str]:
    """The overrides that make a run small."""
    return [*_towers(spec), *_views(spec), *_heads(spec), *_masked(spec), *_unlabelled(spec)]


def _transformer(key: str, spec: TransformerSpec) -> list[str]:
    values = {"width": 16, "layers": 1, "heads": 0, "head_size": 8, "hidden": 32, "dropout": 0}
    if spec.layer == "conformer":
        values["conv_kernels"] = 3
    values["own_ffn"] = min(spec.own_ffn, 1)
    return [f"{key}.{name}={value}" for name, value in values.items()]


def _towers(spec: RunSpec) -> Iterator[str]:
    if spec.shared is not None:
        yield from _transformer("shared", spec.shared)
    for name, joint in spec.joints.items():
        yield from _transformer(f"joints.{name}.backbone", joint.backbone)
    for name, tower in spec.towers.items():
        if tower.post:
            yield f"towers.{name}.post=16"
        if isinstance(tower.cut, SummedSpec):
            yield f"towers.{name}.cut.dropout=0"
        if tower.augment is not None:
            yield f"towers.{name}.augment.bank=8"
        if tower.cut.kind in LATENTS:
            yield f"towers.{name}.cut.{LATENTS[tower.cut.kind]}=8"
        yield from _backbone(name, tower)
        if isinstance(tower.quantizer, GumbelSpec):
            yield from (f"towers.{name}.quantizer.{k}" for k in ("width=16", "hidden=32"))
        if hasattr(tower.positions, "dropout"):
            yield f"towers.{name}.positions.dropout=0"


def _backbone(name: str, tower: TowerSpec) -> Iterator[str]:
    key, backbone = f"towers.{name}.backbone", tower.backbone
    if isinstance(backbone, CausalConvSpec):
        yield f"towers.{name}.cut.channels=16"  # its latents are what the backbone reads
        yield from (f"{key}.{k}" for k in ("width=16", "kernels=[2, 3]"))
    if isinstance(backbone, RecurrentSpec):
        yield from (f"{key}.{k}" for k in ("width=16", "layers=2", "dropout=0"))
        if tower.cut.kind == "wave_conv":  # its latents are what the backbone reads
            yield from (f"towers.{name}.cut.channels=16", f"{key}.width_in=16")
    if isinstance(backbone, DilatedConvSpec):
        yield f"towers.{name}.cut.channels=16"
        sizes = ("width_in=16", "width=16", "hidden=16", "blocks=2", "repeats=2")
        yield from (f"{key}.{k}" for k in sizes)
    if isinstance(backbone, PointwiseSpec):
        yield f"{key}.width=16"
    yield from _network(key, tower)
    if isinstance(backbone, TransformerSpec):
        yield from _transformer(key, backbone)
        if backbone.relative_grid:
            side = SIDE // tower.cut.patch[-1]
            yield f"{key}.relative_grid=[{side}, {side}]"


def _network(key: str, tower: TowerSpec) -> Iterator[str]:
    backbone = tower.backbone
    if isinstance(backbone, BYOLASpec):
        yield from (f"{key}.{k}" for k in ("hidden=16", "dropout=0"))
    if isinstance(backbone, ResNetSpec | S3DGSpec):
        yield f"{key}.channels=8"
    if isinstance(backbone, Audio2VecSpec):
        yield from (f"{key}.{k}" for k in ("channels=[8, 8]", "width=16", "frames=6", "shift=6"))
    if isinstance(backbone, PASESpec):
        yield from (f"{key}.{k}" for k in ("width=16", f"channels={[8] * len(backbone.channels)}"))
    if isinstance(backbone, SincNetSpec):
        yield f"{key}.widths=[16, 16]"
    if isinstance(backbone, ResNetSpec):
        yield f"{key}.blocks=[1, 1, 1, 1]"


def _views(spec: RunSpec) -> Iterator[str]:
    for name, view in spec.views.items():
        if view.modality == "audio":
            longest = SAMPLES / 16000 if view.codes else SAMPLES / view.hz
            tower = spec.towers[view.tower_name]
            if tower.cut.kind == "patches" and len(tower.cut.patch) == 2:  # two patches, at least
                longest = max(longest, 2 * tower.cut.patch[0] * tower.frontend.hop / view.hz)
            yield f"views.{name}.crop_s={min(view.crop_s, longest)}"
        elif view.modality == "video":
            yield f"views.{name}.crop_s={min(view.crop_s, FRAMES / view.fps)}"
            yield f"views.{name}.size={SIDE}"
        else:
            yield f"views.{name}.length=8"


def _masked(spec: RunSpec) -> Iterator[str]:
    for name, task in spec.tasks.items():
        if task.kind == "future" and getattr(task.target, "predictor", None) is not None:
            yield from _transformer(f"tasks.{name}.target.predictor", task.target.predictor)
        if task.kind != "masked":
            continue
        if task.target.kind == "latents":
            yield f"tasks.{name}.target.layers=1"
        if task.target.kind == "patches" and task.target.decoder is not None:
            yield from _transformer(f"tasks.{name}.target.decoder", task.target.decoder)


def _rebuilt(key: str, task: ReconstructSpec) -> Iterator[str]:
    if task.slices is not None:
        yield f"{key}.slices.frames=6"
    if task.quantizer is not None:
        yield f"{key}.quantizer.entries=8"
    sizes = {"conv": {"channels": [8, 8]}, "wavenet": {"channels": 8, "skip": 8, "depth": 3}}
    for name, value in sizes.get(task.decoder.kind, {}).items():
        yield f"{key}.decoder.{name}={value}"


_PRETEXTS = {
    "rotation": (),
    "gap": ("frames=6",),
    "clusters": ("clips=6", "clusters=2", "components=3"),
    "sequence": ("frames=2", "gap=3"),
    "order": ("tiles=[2]",),
}


def _unlabelled(spec: RunSpec) -> Iterator[str]:
    for name, task in spec.tasks.items():
        key = f"tasks.{name}"
        if isinstance(task, ReconstructSpec):
            yield from _rebuilt(key, task)
        if task.kind == "regress" and task.decoder.kind == "waveform":
            yield f"{key}.decoder.channels={[8] * len(task.decoder.channels)}"
        if task.kind == "alignment":
            yield from (f"{key}.{k}" for k in ("width=8", "hidden=[16, 16]", "critic_steps=2"))
        if task.kind == "prototypes":
            yield from (f"{key}.{k}" for k in ("projector.widths=[16, 16]", "prototypes=8"))
            yield f"{key}.queue={min(task.queue, 8)}"
        if task.kind == "classify" and task.target.kind in _PRETEXTS:
            yield f"{key}.embed={[16] * len(task.embed)}"
            yield from (f"{key}.target.{k}" for k in _PRETEXTS[task.target.kind])


def _heads(spec: RunSpec) -> Iterator[str]:
    for name, task in spec.tasks.items():
        if task.kind == "siamese":
            yield f"tasks.{name}.projector.widths={[16] * len(task.projector.widths)}"
            if task.predictor is not None:
                yield f"tasks.{name}.predictor.widths={[16] * len(task.predictor.widths)}"
            if task.objective.kind == "queue":
                yield f"tasks.{name}.objective.size=16"
        if task.kind != "pairs":
            continue
        for space, s in task.heads.spaces.items():
            steps = min(s.steps, 8)
            dim = (16 if task.heads.form == "none" else 8) * steps if s.pool == "steps" else 16
            key = f"tasks.{name}.heads.spaces.{space}"
            yield from (f"{key}.{k}" for k in (f"dim={dim}", f"steps={steps}"))
        for pair, p in task.pairs.items():
            if p.score.kind == "map" and "none" not in str(p.score.form):
                yield f"tasks.{name}.pairs.{pair}.score.dim=8"


def small_model(spec: RunSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """The run's model with seeded weights."""
    torch.manual_seed(seed)
    return build_model(spec, VOCABULARY, SPECIAL, BEGINS).to(dtype)


def make_tokens(
    x_PND: Tensor,
    grid: tuple[int, ...],
    pad_PN: Tensor | None = None,
    extra: dict[str, Tensor] | None = None,
    rate_hz: float = 0.0,
    view: ViewBatch | None = None,
) -> Tokens:
    """Tokens as a tower would return them; the stem's are the same."""
    pad = torch.zeros(x_PND.shape[:2], dtype=torch.bool) if pad_PN is None else pad_PN
    return Tokens(
        x_PND=x_PND,
        pad_PN=pad,
        stem_PMD=x_PND,
        stem_pad_PM=pad,
        grid=grid,
        stem_grid=grid,
        extra=extra or {},
        rate_hz=rate_hz,
        stem_rate_hz=rate_hz,
        view=view,
    )


def equal_rows(batch: Batch) -> Batch:
    """The batch with every item's content replaced by that of the first, of other sources still."""
    views = {
        name: replace(
            view,
            data=view.data[:1].expand_as(view.data).clone(),
            seeds_P=view.seeds_P[:1].expand_as(view.seeds_P).clone(),
        )
        for name, view in batch.views.items()
    }
    return replace(batch, views=views)


def full_batch(spec: RunSpec, rows: int = 6, seed: int = 0) -> Batch:
    """A batch in which nothing is missing."""
    return fake_batch(spec, rows, seed, missing=False)


def values(model: Model, batch: Batch, position: float = 0.0) -> dict[str, float]:
    """{term: sum / count} in the model's present mode."""
    _, terms = model(batch, round(100 * position), 100)
    return {name: float(t.sum / t.count.clamp(min=1)) for name, t in terms.items()}
