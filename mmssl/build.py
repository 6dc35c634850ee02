"""Specs to modules: the only reader of the part tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from mmssl.backbones import NETWORKS
from mmssl.backbones.tokens import DenseGelu, ExtraTokens
from mmssl.backbones.transformer import Transformer
from mmssl.frontends import SIGNALS, STEMS, TEXTS, FactorisedPositions, SpectrumParams
from mmssl.heads.dense import MapScore, PairScore, VectorScore
from mmssl.heads.embed import Embedder
from mmssl.heads.project import SpaceHeads
from mmssl.heads.score import Bilinear, Distance, Dot, FusionMLP, ScoreMap
from mmssl.model import Model
from mmssl.specs import (
    BilinearSpec,
    ClassifySpec,
    ConvSpec,
    DistanceSpec,
    DotSpec,
    EmbeddingSpec,
    FusionSpec,
    IdTargetSpec,
    JointSpec,
    LabelSpec,
    MapSpec,
    MaskedSpec,
    PairSpec,
    PairsSpec,
    PatchSpec,
    RunSpec,
    SpectrumSpec,
    StemSpec,
    TaskSpec,
    TowerSpec,
    Trainable,
    TransformerSpec,
    ViewSpec,
)
from mmssl.tasks.base import Task
from mmssl.tasks.classify import JointMatch, Label, Match, PooledReader, VectorMatch
from mmssl.tasks.masked import IdTarget, Masked, PatchTarget, Target
from mmssl.tasks.pairs import Pairs
from mmssl.towers import AnyTower, ConvTower, JointTower, Tower
from mmssl.types import MODALITIES, UserError

CHANNELS = {"audio": 1, "video": 3}


def build_model(
    spec: RunSpec, vocab_size: int = 0, special: Mapping[str, int] | None = None
) -> Model:
    """The model of a run, with fresh weights from torch's global generator.

    vocab_size, special: size and special ids of the tokenizer, needed by text towers.

    Raises:
        UserError: names that do not exist, or parts that do not fit together.
    """
    _check_names(spec)
    special = dict(special or {})
    trunk = _transformer(spec.shared, spec.train.checkpoint_activations) if spec.shared else None
    towers = {name: _tower(name, t, spec, trunk, vocab_size) for name, t in spec.towers.items()}
    tower_of = {name: v.tower or v.modality for name, v in spec.views.items()}
    widths = {view: towers[tower].width for view, tower in tower_of.items()}
    joints = {name: _joint(name, t, widths, spec) for name, t in spec.joints.items()}
    make = _TaskBuilder(spec, towers, joints, widths, vocab_size, special)
    tasks = {name: make(name, t) for name, t in spec.tasks.items()}
    model = Model(spec, towers, joints, trunk, tasks)
    model.set_policy(_policy(spec, model))
    return model


def _check_names(spec: RunSpec) -> None:
    for name, view in spec.views.items():
        tower = view.tower or view.modality
        found = spec.towers.get(tower)
        if found is None:
            raise UserError(
                f"views.{name}.tower: no tower {tower!r}; towers are {', '.join(spec.towers)}"
            )
        if found.modality != view.modality:
            raise UserError(
                f"views.{name}: a {view.modality} view cannot be read by the {found.modality} tower {tower!r}"
            )
        rate = found.frontend.sample_rate if isinstance(found.frontend, SpectrumSpec) else view.hz
        if view.modality == "audio" and rate != view.hz:
            raise UserError(
                f"views.{name}.hz: {view.hz} Hz, but towers.{tower}.frontend.sample_rate is {rate} Hz; "
                "make them equal"
            )


def _need_view(spec: RunSpec, name: str, where: str) -> ViewSpec:
    if name not in spec.views:
        raise UserError(f"{where}: no view {name!r}; views are {', '.join(spec.views)}")
    return spec.views[name]


# ---------------------------------------------------------------- towers


def _transformer(spec: TransformerSpec, checkpointing: bool) -> Transformer:
    own = MODALITIES if spec.own_norms else ()
    return Transformer(
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
        head_size=spec.head_size,
        hidden=spec.hidden,
        dropout=spec.dropout,
        norms_for=own,
        ffn_for=MODALITIES if spec.own_ffn else (),
        ffn_layers=spec.own_ffn,
        post_norm=spec.post_norm,
        relative_buckets=spec.relative_buckets,
        relative_distance=spec.relative_distance,
        checkpointing=checkpointing,
    )


def _tower(
    name: str, spec: TowerSpec, run: RunSpec, trunk: Transformer | None, vocab_size: int
) -> AnyTower:
    signal = _signal(spec)
    if isinstance(spec.backbone, ConvSpec):
        if signal is None:
            raise UserError(f"towers.{name}.backbone: {spec.backbone.kind} cannot read text")
        options = spec.backbone.model_dump(exclude={"kind"})
        network = NETWORKS[spec.backbone.kind](CHANNELS[spec.modality], **options)
        return ConvTower(spec.modality, signal, network)
    own = spec.backbone if isinstance(spec.backbone, TransformerSpec) else None
    encoder = trunk if own is None else _transformer(own, run.train.checkpoint_activations)
    if encoder is None:
        raise UserError(
            f"towers.{name}.backbone: `shared`, but the run has no `shared` transformer"
        )
    stem = _stem(name, spec, encoder.width, vocab_size)
    return Tower(
        spec.modality,
        signal,
        stem,
        _positions(name, spec, run, signal, stem, encoder.width),
        ExtraTokens(encoder.width, spec.globals, spec.registers),
        encoder,
        shared=own is None,
        drop=spec.drop_tokens,
        pre=DenseGelu(encoder.width, encoder.width) if spec.pre else None,
        post=DenseGelu(encoder.width, spec.post) if spec.post else None,
    )


def _signal(spec: TowerSpec) -> nn.Module | None:
    options = spec.frontend.model_dump(exclude={"kind"})
    if isinstance(spec.frontend, SpectrumSpec):
        if spec.frontend.kind == "log_spectrogram":
            options = {k: v for k, v in options.items() if not k.startswith("mel_")}
        return SIGNALS[spec.frontend.kind](SpectrumParams(**options))
    return None if spec.frontend.kind == "ids" else SIGNALS[spec.frontend.kind](**options)


def _stem(name: str, spec: TowerSpec, width: int, vocab_size: int) -> nn.Module:
    cut = spec.cut
    if isinstance(cut, EmbeddingSpec):
        if vocab_size <= 0:
            raise UserError(f"towers.{name}: a text tower needs a tokenizer; set data.tokenizer")
        if cut.kind == "embedding":
            return TEXTS["embedding"](vocab_size, width)
        table = _word_table(cut.table) if cut.table else None
        generator = torch.Generator().manual_seed(0)
        return TEXTS["frozen"](vocab_size, width, cut.table_width, table, generator)
    if isinstance(cut, PatchSpec):
        return STEMS["patches"](cut.patch, width, CHANNELS[spec.modality])
    if isinstance(cut, StemSpec):
        options = cut.model_dump(exclude={"kind", "temporal_kernel", "temporal_stride"})
        if spec.modality == "video":
            time = {"temporal_kernel": cut.temporal_kernel, "temporal_stride": cut.temporal_stride}
            return STEMS["video_conv"](width, **options, **time)
        rank = 1 if spec.frontend.kind == "waveform" else 2
        return STEMS["conv"](width, **options, rank=rank)
    raise UserError(f"towers.{name}.cut: `whole` needs a convolutional backbone")


def _word_table(path: str) -> torch.Tensor:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such word table; give a safetensors file with the key `weight`"
        )
    tensors = load_file(path)
    if "weight" not in tensors:
        raise UserError(f"{path}: no key `weight`, only {', '.join(tensors)}")
    return tensors["weight"]


def _positions(
    name: str, spec: TowerSpec, run: RunSpec, signal: nn.Module | None, stem: nn.Module, width: int
) -> nn.Module | None:
    if spec.positions.kind == "none":
        return None
    grid = spec.positions.grid or _native_grid(name, run, signal, stem)
    options = spec.positions.model_dump(exclude={"kind", "grid"})
    return FactorisedPositions(grid, width, **options)


def _native_grid(
    name: str, run: RunSpec, signal: nn.Module | None, stem: nn.Module
) -> Sequence[int]:
    """Token grid of the first view that the tower reads."""
    for view_name, view in run.views.items():
        if (view.tower or view.modality) == name:
            shape = data_shape(view_name, view)
            axes = shape if signal is None else signal.grid(shape)  # type: ignore[operator]
            grid: Sequence[int] = stem.grid(axes)  # type: ignore[operator]
            return grid
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
    return (max(1, round(view.crop_s * view.fps)), view.size, view.size, 3)


def _joint(name: str, spec: JointSpec, widths: Mapping[str, int], run: RunSpec) -> JointTower:
    for view in spec.of:
        _need_view(run, view, f"joints.{name}.of")
    trunk = _transformer(spec.backbone, run.train.checkpoint_activations)
    return JointTower(spec.of, widths, ExtraTokens(trunk.width, spec.globals), trunk)


# ---------------------------------------------------------------- tasks


class _TaskBuilder:
    """Makes tasks from their specs; knows the towers' widths."""

    def __init__(
        self,
        spec: RunSpec,
        towers: Mapping[str, AnyTower],
        joints: Mapping[str, JointTower],
        widths: Mapping[str, int],
        vocab_size: int,
        special: dict[str, int],
    ) -> None:
        self.spec, self.towers, self.joints = spec, towers, joints
        self.widths, self.vocab_size, self.special = widths, vocab_size, special

    def __call__(self, name: str, task: TaskSpec) -> Task:
        if isinstance(task, PairsSpec):
            return self._pairs(name, task)
        if isinstance(task, MaskedSpec):
            return self._masked(name, task)
        return self._classify(name, task)

    def _modality(self, view: str, where: str) -> str:
        return _need_view(self.spec, view, where).modality

    # pairs

    def _pairs(self, name: str, task: PairsSpec) -> Task:
        pairs = {
            key: self._pair(f"tasks.{name}.pairs.{key}", task, p) for key, p in task.pairs.items()
        }
        modality_of = {
            v: self._modality(v, f"tasks.{name}") for p in pairs.values() for v in p.between
        }
        embedder = self._embedder(name, task, pairs, modality_of)
        scores = {key: self._score(task, p) for key, p in pairs.items()}
        return Pairs(embedder, pairs, scores, task.chunk, task.weight)

    def _pair(self, where: str, task: PairsSpec, pair: PairSpec) -> PairSpec:
        """The pair with its space filled in and its order checked."""
        modalities = [self._modality(view, f"{where}.between") for view in pair.between]
        if isinstance(pair.score, MapSpec) and modalities != ["video", "audio"]:
            raise UserError(
                f"{where}.between: a map score compares [video view, audio view], in this order"
            )
        slots = [self.spec.views[view].candidates for view in pair.between]
        if slots[0] > 1 or (slots[1] > 1 and pair.objective.kind != "mil_nce"):
            raise UserError(
                f"{where}: a view with several candidates must come second and needs objective mil_nce"
            )
        if not pair.space and len(task.heads.spaces) > 1 and not isinstance(pair.score, MapSpec):
            raise UserError(f"{where}.space: choose one of {', '.join(task.heads.spaces)}")
        space = pair.space or next(iter(task.heads.spaces))
        if space not in task.heads.spaces:
            raise UserError(
                f"{where}.space: no space {space!r}; spaces are {', '.join(task.heads.spaces)}"
            )
        return pair.model_copy(update={"space": space})

    def _embedder(
        self,
        name: str,
        task: PairsSpec,
        pairs: Mapping[str, PairSpec],
        modality_of: Mapping[str, str],
    ) -> Embedder:
        heads = task.heads
        vector_pairs = [p for p in pairs.values() if not isinstance(p.score, MapSpec)]
        used: dict[str, set[str]] = {}
        for pair in vector_pairs:
            used.setdefault(pair.space, set()).update(modality_of[v] for v in pair.between)
        widths = {modality_of[v]: self.widths[v] for v in modality_of}
        members = {
            s: spec.members or sorted(used.get(s, ()))
            for s, spec in heads.spaces.items()
            if s in used
        }
        spaces = {s: spec for s, spec in heads.spaces.items() if s in used}
        for s, spec in spaces.items():
            if spec.pool == "steps" and spec.dim % spec.steps:
                raise UserError(
                    f"tasks.{name}.heads.spaces.{s}: dim {spec.dim} is not a multiple of steps {spec.steps}"
                )
        dims = {
            s: spec.dim // (spec.steps if spec.pool == "steps" else 1) for s, spec in spaces.items()
        }
        projection = SpaceHeads(
            heads.graph,
            widths,
            dims,
            members if heads.graph == "linear" else None,
            heads.form,
            heads.hidden,
            heads.bias,
            heads.audio_norm,
        )
        return Embedder(projection, spaces, modality_of)

    def _score(self, task: PairsSpec, pair: PairSpec) -> PairScore:
        score = pair.score
        if isinstance(score, MapSpec):
            video, audio = pair.between
            widths = {"video": self.widths[video], "audio": self.widths[audio]}
            table = ScoreMap(score.space, score.time, score.aligned, score.normalize)
            return MapScore(widths, score.dim, table)
        if isinstance(score, DotSpec):
            return VectorScore(Dot(score.normalize))
        if isinstance(score, BilinearSpec):
            return VectorScore(Bilinear(task.heads.spaces[pair.space].dim, score.std))
        return VectorScore(Distance())

    # masked

    def _masked(self, name: str, task: MaskedSpec) -> Task:
        view = _need_view(self.spec, task.view, f"tasks.{name}.view")
        tower = self.towers[view.tower or view.modality]
        if not isinstance(tower, Tower):
            raise UserError(
                f"tasks.{name}.view: {task.view} has a convolutional backbone; use a transformer"
            )
        target: Target
        if isinstance(task.target, IdTargetSpec):
            if view.modality != "text":
                raise UserError(
                    f"tasks.{name}.target: `ids` needs a text view, {task.view} is {view.modality}"
                )
            target = IdTarget(self.vocab_size, self.special, task.mask.shares)
        else:
            cells = CHANNELS[view.modality]
            for step in tower.cell:
                cells *= step
            target = PatchTarget(cells, task.target.normalize, task.target.loss)
        widths = (tower.trunk_width, tower.width)
        return Masked(
            name, task.view, widths, target, task.mask, task.hidden, task.rows, task.weight
        )

    # classify

    def _classify(self, name: str, task: ClassifySpec) -> Task:
        if isinstance(task.target, LabelSpec):
            _need_view(self.spec, task.target.view, f"tasks.{name}.target.view")
            return Label(task.target, self.widths[task.target.view], task.pool, task.weight)
        for view in (*task.target.between, *([task.target.shifted] if task.target.shifted else [])):
            _need_view(self.spec, view, f"tasks.{name}.target")
        return Match(name, task.target, self._match_score(name, task), task.weight)

    def _match_score(self, name: str, task: ClassifySpec) -> VectorMatch | JointMatch:
        assert not isinstance(task.target, LabelSpec)
        views, score = task.target.between, task.score
        if isinstance(score, DistanceSpec | FusionSpec):
            reader = PooledReader(views, dict(self.widths), task.pool, task.embed)
            widths = [task.embed[-1] if task.embed else self.widths[v] for v in views]
            if isinstance(score, FusionSpec):
                return VectorMatch(reader, FusionMLP(widths[0], widths[1], score.hidden))
            if widths[0] != widths[1]:
                raise UserError(
                    f"tasks.{name}.embed: a distance needs vectors of one width; give embed: [width]"
                )
            return VectorMatch(reader, Distance())
        joint = self.spec.joints.get(score.joint)
        if joint is None or set(joint.of) != set(views):
            raise UserError(
                f"tasks.{name}.score.joint: {score.joint!r} is no joint tower of {list(views)}"
            )
        return JointMatch(score.joint, views, self.joints[score.joint].width, joint.reduce)


# ---------------------------------------------------------------- learning rates and start weights


def _policy(spec: RunSpec, model: nn.Module) -> dict[str, tuple[float, bool]]:
    """{parameter: (learning-rate factor, frozen)} from the towers' own settings."""
    groups: list[tuple[str, Trainable, int]] = []
    if spec.shared is not None:
        groups.append(("trunk.", spec.shared, spec.shared.layers))
    for name, tower in spec.towers.items():
        own = tower.backbone.layers if isinstance(tower.backbone, TransformerSpec) else 0
        groups.append((f"towers.{name}.", tower, own))
    for name, joint in spec.joints.items():
        groups.append((f"joints.{name}.", joint, joint.backbone.layers))
    out = {}
    for parameter, _ in model.named_parameters():
        for prefix, part, layers in groups:
            if parameter.startswith(prefix):
                depth = _layers_above(parameter, layers)
                out[parameter] = (part.lr_scale * part.layer_decay**depth, part.freeze)
    return out


def _layers_above(parameter: str, layers: int) -> int:
    """How many layers lie between a parameter and the top of its tower."""
    parts = parameter.split(".")
    if "blocks" in parts:
        return layers - int(parts[parts.index("blocks") + 1])
    on_top = any(p in parts for p in ("post", "norm"))
    return 0 if on_top else layers + 1
