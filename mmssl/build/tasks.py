"""Tasks from their specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmssl.build.later import make_future
from mmssl.build.players import make_alignment
from mmssl.build.pretext import make_pretext
from mmssl.build.reconstruct import make_reconstruct
from mmssl.build.regress import make_regress
from mmssl.build.scores import check_map, make_map
from mmssl.build.separate import make_separate
from mmssl.build.siamese import make_prototypes, make_siamese
from mmssl.build.targets import (
    TARGETS,
    TargetContext,
    Vocabulary,
    check_mask,
    word_begins,
)
from mmssl.build.towers import need_view
from mmssl.heads.dense import PairScore, StepScore, VectorScore
from mmssl.heads.embed import POOLINGS, Embedder, poolings
from mmssl.heads.match import (
    JointMatch,
    MapMatch,
    MatchScore,
    PooledReader,
    SpaceReader,
    VectorMatch,
)
from mmssl.heads.project import SpaceHeads
from mmssl.heads.score import Bilinear, Distance, Dot, FusionMLP
from mmssl.objectives.contrastive import LogitScale
from mmssl.specs import (
    AlignmentSpec,
    BilinearSpec,
    ClassifySpec,
    CriticSpec,
    DistanceSpec,
    DotSpec,
    FusionSpec,
    FutureSpec,
    InfoNCESpec,
    LabelSpec,
    MapSpec,
    MaskedSpec,
    MatchMapSpec,
    MatchSpec,
    MilNCESpec,
    PairSpec,
    PairsSpec,
    PrototypesSpec,
    ReconstructSpec,
    RegressSpec,
    RunSpec,
    SemiHardSpec,
    SeparateSpec,
    SiameseSpec,
    TaskSpec,
    TowerSpec,
)
from mmssl.tasks.base import Task
from mmssl.tasks.classify import Label, Match
from mmssl.tasks.masked import Masked
from mmssl.tasks.pairs import Pairs
from mmssl.towers import AnyTower, JointTower, Tower
from mmssl.types import UserError


class TaskBuilder:
    """Makes tasks from their specs; knows the towers' widths."""

    def __init__(
        self,
        spec: RunSpec,
        towers: Mapping[str, AnyTower],
        joints: Mapping[str, JointTower],
        widths: Mapping[str, int],
        vocabulary: Vocabulary,
    ) -> None:
        self.spec, self.towers, self.joints = spec, towers, joints
        self.widths, self.vocabulary = widths, vocabulary
        self.embedders: dict[str, Embedder] = {}  # of the pairs tasks made so far

    def __call__(self, name: str, task: TaskSpec) -> Task:
        """One task.

        Raises:
            UserError: names that do not exist, or parts that do not fit together.
        """
        if isinstance(task, PairsSpec):
            return self._pairs(name, task)
        if isinstance(task, MaskedSpec):
            return self._masked(name, task)
        if isinstance(task, AlignmentSpec):
            return make_alignment(name, task, self.spec)
        if isinstance(task, RegressSpec):
            return make_regress(name, task, self.spec, self.towers)
        if isinstance(task, FutureSpec):
            return make_future(self.spec, name, task, self.towers)
        if isinstance(task, SeparateSpec):
            return make_separate(self.spec, name, task, self.towers)
        if isinstance(task, SiameseSpec):
            widths = self.widths
            return make_siamese(name, task, self.spec, self.towers, widths, self._check_pool)
        encoders = (self.towers, self.widths)
        if isinstance(task, ReconstructSpec):
            return make_reconstruct(name, task, self.spec, encoders, self._check_pool)
        if isinstance(task, PrototypesSpec):
            return make_prototypes(name, task, self.spec, encoders, self._check_pool)
        return self._classify(name, task)

    def _modality(self, view: str, where: str) -> str:
        return need_view(self.spec, view, where).modality

    # pairs

    def _pairs(self, name: str, task: PairsSpec) -> Task:
        pairs = {
            key: self._pair(f"tasks.{name}.pairs.{key}", task, p) for key, p in task.pairs.items()
        }
        modality_of = {
            v: self._modality(v, f"tasks.{name}") for p in pairs.values() for v in p.between
        }
        embedder = self._embedder(name, task, pairs, modality_of)
        scores = {k: self._score(f"tasks.{name}.pairs.{k}", task, p) for k, p in pairs.items()}
        self.embedders[name] = embedder
        return Pairs(embedder, pairs, scores, task.chunk, task.weight)

    def _pair(self, where: str, task: PairsSpec, pair: PairSpec) -> PairSpec:
        """The pair with its space filled in and its order checked."""
        for view in pair.between:
            need_view(self.spec, view, f"{where}.between")
        self._check_objective(where, pair)
        if isinstance(pair.score, MapSpec):
            check_map(self.spec, where, pair.between, pair.score, self._check_pool)
        slots = [self.spec.views[view].candidates for view in pair.between]
        if slots[0] > 1 or (slots[1] > 1 and pair.objective.kind != "mil_nce"):
            raise UserError(
                f"{where}: a view with several candidates must come second and needs objective "
                "mil_nce"
            )
        if not pair.space and len(task.heads.spaces) > 1 and not isinstance(pair.score, MapSpec):
            raise UserError(f"{where}.space: choose one of {', '.join(task.heads.spaces)}")
        space = pair.space or next(iter(task.heads.spaces))
        if space not in task.heads.spaces:
            raise UserError(
                f"{where}.space: no space {space!r}; spaces are {', '.join(task.heads.spaces)}"
            )
        return pair.model_copy(update={"space": space})

    def _check_objective(self, where: str, pair: PairSpec) -> None:
        objective, score = pair.objective, pair.score
        is_map = isinstance(score, MapSpec)
        soft = isinstance(score, MapSpec) and score.space == "soft"
        if soft and not isinstance(objective, InfoNCESpec):
            raise UserError(
                f"{where}.objective: the background of a `soft` map is one more negative of "
                "info_nce; use that or another score.space"
            )
        two_n = isinstance(objective, InfoNCESpec) and objective.form == "two_n"
        unit = isinstance(score, DotSpec) and score.normalize
        if (two_n or isinstance(objective, SemiHardSpec)) and not unit:
            raise UserError(
                f"{where}.score: {'form two_n' if two_n else 'semi_hard'} compares unit vectors; "
                "set score: {kind: dot}"
            )
        if isinstance(objective, SemiHardSpec) and objective.negative == "mixed":
            augments = self.spec.views[pair.between[1]].augment
            if all(a.kind != "mel_mix" for a in augments):
                raise UserError(
                    f"{where}.objective.negative: `mixed` needs augmentation mel_mix in "
                    f"views.{pair.between[1]}"
                )
        if isinstance(score, FusionSpec) and not isinstance(objective, CriticSpec):
            raise UserError(f"{where}.score: a fusion of two vectors needs objective critic")
        if {*pair.penalties} - {"temperature"} and not is_map:
            raise UserError(f"{where}.penalties: they are for map scores; set score.kind: map")
        learned = isinstance(objective, InfoNCESpec | MilNCESpec) and objective.learned
        if "temperature" in pair.penalties and not learned:
            raise UserError(
                f"{where}.penalties.temperature: needs info_nce or mil_nce with learned: true"
            )

    def _check_pool(self, where: str, view: str, how: str) -> None:
        known = [*self._tower_spec(view).globals, *POOLINGS]
        if how not in known:
            raise UserError(f"{where}: {how!r} is not known; use one of {', '.join(known)}")

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
        spaces = {s: spec for s, spec in heads.spaces.items() if s in used}
        members = {s: sorted({*spec.members} or used[s]) for s, spec in spaces.items()}
        for s, spec in spaces.items():
            if "steps" in poolings(spec) and (spec.dim % spec.steps or len(poolings(spec)) > 1):
                raise UserError(
                    f"tasks.{name}.heads.spaces.{s}: pool `steps` is for all modalities of a space "
                    f"and needs a dim ({spec.dim}) that is a multiple of steps ({spec.steps})"
                )
        dims = {
            s: spec.dim // (spec.steps if "steps" in poolings(spec) else 1)
            for s, spec in spaces.items()
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

    def _score(self, where: str, task: PairsSpec, pair: PairSpec) -> PairScore:
        score = pair.score
        if isinstance(pair.objective, CriticSpec) and pair.objective.per_step:
            space = task.heads.spaces[pair.space]
            if poolings(space) != {"steps"} or not isinstance(score, FusionSpec):
                raise UserError(
                    f"{where}.objective.per_step: compares the steps of a space pooled by `steps`, "
                    "by score `fusion`; use both, or leave it out"
                )
            width = space.dim // space.steps
            return StepScore(FusionMLP(width, width, score.hidden), space.steps)
        if isinstance(score, MapSpec):
            return make_map(self.spec, where, pair.between, score, self.towers)
        if isinstance(score, DotSpec):
            return VectorScore(Dot(score.normalize))
        if isinstance(score, BilinearSpec):
            return VectorScore(Bilinear(task.heads.spaces[pair.space].dim, score.std))
        if isinstance(score, FusionSpec):
            width = task.heads.spaces[pair.space].dim
            return VectorScore(FusionMLP(width, width, score.hidden))
        return VectorScore(Distance(score.slope, score.threshold))

    def _tower_spec(self, view: str) -> TowerSpec:
        return self.spec.towers[self.spec.views[view].tower_name]

    def _transformer_tower(self, where: str, view: str) -> Tower:
        tower = self.towers[self.spec.views[view].tower_name]
        if not isinstance(tower, Tower):
            raise UserError(f"{where}: {view} has a convolutional backbone; use a transformer")
        return tower

    # masked

    def _masked(self, name: str, task: MaskedSpec) -> Task:
        codes = need_view(self.spec, task.view, f"tasks.{name}.view").codes
        tower = self._transformer_tower(f"tasks.{name}.view", task.view)
        words = self.vocabulary
        if codes is not None:
            words = Vocabulary(codes.vocabulary, codes.special, ())
        context = TargetContext(name, task, self.spec, tower, words, self.towers)
        check_mask(context)
        target = TARGETS[type(task.target)](context)
        marked = 0
        if task.mask.hide != "drop" and not target.alters:
            marked = self._marked(name, task, tower)
        return Masked(
            name,
            task.view,
            target,
            task.mask,
            marked,
            task.rows,
            task.weight,
            task.weights,
            word_begins(context),
        )

    def _marked(self, name: str, task: MaskedSpec, tower: Tower) -> int:
        """Width of the vector that marks or replaces what is hidden."""
        if task.mask.hide != "features":
            return tower.entry_width
        if tower.latent_width is None:
            raise UserError(
                f"tasks.{name}.mask.hide: `features` are latents of the stem; use a tower whose "
                "cut is `wave_conv` or `frame_latents`, or hide cells"
            )
        if tower.quantizer is not None:
            raise UserError(
                f"tasks.{name}.mask.hide: `features` would pass by the tower's quantizer; hide "
                "cells or latents"
            )
        return tower.latent_width

    # classify

    def _classify(self, name: str, task: ClassifySpec) -> Task:
        if isinstance(task.target, LabelSpec):
            return self._label(name, task, task.target)
        if not isinstance(task.target, MatchSpec):
            return make_pretext(name, task, self.spec, self.towers, self.widths, self._check_pool)
        for view in (*task.target.between, *([task.target.shifted] if task.target.shifted else [])):
            need_view(self.spec, view, f"tasks.{name}.target")
        score, where = self._match_score(name, task), f"tasks.{name}.target.similar"
        similar = None
        if task.target.similar:
            similar = self._space(where, task.target.similar, task.target.between)[0]
        elif isinstance(score, JointMatch | MapMatch) and task.target.hard != 0:
            raise UserError(
                f"{where}: a {task.score.kind} score would need a pass for every pair to find the "
                "hard ones; name a space, or set hard: 0"
            )
        return Match(name, task.target, score, task.weight, similar)

    def _label(self, name: str, task: ClassifySpec, target: LabelSpec) -> Task:
        views = (target.view, *target.also)
        for view in views:
            need_view(self.spec, view, f"tasks.{name}.target")
        if target.field not in self.spec.data.labels:
            raise UserError(
                f"tasks.{name}.target.field: {target.field!r} is not read in training; add it to "
                "data.labels"
            )
        width, reader = self.widths[target.view], None
        if task.space:
            reader, width = self._space(f"tasks.{name}.space", task.space, views)
        return Label(target, width, task.pool, task.weight, reader)

    def _match_score(self, name: str, task: ClassifySpec) -> MatchScore:
        assert isinstance(task.target, MatchSpec)
        views, score = task.target.between, task.score
        if isinstance(score, MatchMapSpec):
            _only_defaults(name, task, "a map score has its own `query`", "pool", "embed", "space")
            check_map(self.spec, f"tasks.{name}", views, score, self._check_pool)
            scale = LogitScale(score.scale, bias=score.bias)
            table = make_map(self.spec, f"tasks.{name}", views, score, self.towers)
            return MapMatch(table, scale)
        if isinstance(score, DistanceSpec | FusionSpec):
            reader, widths = self._reader(name, task)
            if isinstance(score, FusionSpec):
                return VectorMatch(reader, FusionMLP(widths[0], widths[1], score.hidden))
            if widths[0] != widths[1]:
                raise UserError(
                    f"tasks.{name}.embed: a distance needs vectors of one width; "
                    "give embed: [width]"
                )
            return VectorMatch(reader, Distance(score.slope, score.threshold))
        _only_defaults(name, task, "a joint score reads tokens", "pool", "embed", "space")
        joint = self.spec.joints.get(score.joint)
        if joint is None or set(joint.of) != set(views):
            raise UserError(
                f"tasks.{name}.score.joint: {score.joint!r} is no joint tower of {list(views)}"
            )
        return JointMatch(score.joint, views, self.joints[score.joint].width, joint.reduce)

    def _reader(
        self, name: str, task: ClassifySpec
    ) -> tuple[PooledReader | SpaceReader, list[int]]:
        """What a match compares, and the widths of its two vectors."""
        assert isinstance(task.target, MatchSpec)
        views = task.target.between
        if not task.space:
            if task.pool == "steps":
                raise UserError(f"tasks.{name}.pool: `steps` needs a space; set tasks.{name}.space")
            for view in views:
                self._check_pool(f"tasks.{name}.pool", view, task.pool)
            reader = PooledReader(views, dict(self.widths), task.pool, task.embed)
            return reader, [task.embed[-1] if task.embed else self.widths[v] for v in views]
        _only_defaults(name, task, "a space makes the vectors", "pool", "embed")
        found, width = self._space(f"tasks.{name}.space", task.space, views)
        return found, [width] * 2

    def _space(self, where: str, path: str, views: Sequence[str]) -> tuple[SpaceReader, int]:
        """Reader of a space of a pairs task above, and its width."""
        owner, _, space = path.partition(".")
        embedder = self.embedders.get(owner)
        reached = [embedder.reaches(v, space) for v in views] if embedder is not None else [False]
        if embedder is None or not all(reached):
            known = [f"{t}.{s}" for t, e in self.embedders.items() for s in e.spaces]
            raise UserError(
                f"{where}: {path!r} is no space that {' and '.join(views)} "
                f"share in a pairs task before it; there are {', '.join(known) or 'none'}"
            )
        return SpaceReader(embedder, space), embedder.spaces[space].dim


def _only_defaults(name: str, task: ClassifySpec, why: str, *keys: str) -> None:
    for key in keys:
        if getattr(task, key) != ClassifySpec.model_fields[key].get_default():
            raise UserError(f"tasks.{name}.{key}: not read, {why}; leave it out")
