"""Records of the tasks, their objectives and targets."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Modality, Number, Spec
from mmssl.specs.heads import DotSpec, FusionSpec, HeadsSpec, MatchScoreSpec, MLPSpec, ScoreSpec
from mmssl.specs.objectives import (
    CosineSpec,
    CrossCorrelationSpec,
    InfoNCESpec,
    PairObjective,
    QueueSpec,
)
from mmssl.specs.players import AlignmentSpec
from mmssl.specs.quantizers import QuantizerSpec
from mmssl.specs.reconstruct import ReconstructSpec
from mmssl.specs.regress import RegressSpec
from mmssl.specs.separate import SeparateSpec
from mmssl.specs.targets import TargetSpec
from mmssl.specs.towers import TransformerSpec


class PairSpec(Spec):
    """Two views compared in one space.

    `penalties`: weights of what keeps a map score in shape (DenseAV, see
    `mmssl.objectives.dense`), and of `temperature`, the squared logarithm of a scale below 1.
    """

    between: tuple[str, str]
    space: str = ""  # empty: the only space
    score: ScoreSpec = DotSpec()
    objective: PairObjective = InfoNCESpec()
    weight: Number = 1.0
    penalties: dict[Literal["negative", "variation", "overlap", "temperature"], Number] = {}


class PairsSpec(Spec):
    """Contrastive task over named pairs that share projection heads."""

    kind: Literal["pairs"]
    heads: HeadsSpec = HeadsSpec()
    pairs: dict[str, PairSpec] = Field(min_length=1)
    chunk: int = Field(1024, gt=0)  # query rows per block of logits
    weight: Number = 1.0


class MatchSpec(Spec):
    """Does this video belong to this audio?

    `coin`: half of the rows keep their own partner (AVE-Net); `both`: every row serves once with
    its own and once with another partner. `shifted`: a further audio view of the same clip, at
    another time, as an extra negative. `hard`: share of negatives that are the most similar row of
    the batch: by the score itself, or by cosine in the space `similar` of a pairs task above
    ("task.space"), which a joint score needs.
    """

    kind: Literal["match"]
    between: tuple[str, str]
    draw: Literal["coin", "both"] = "both"
    shifted: str = ""
    hard: Number = 0.0
    similar: str = ""


class LabelSpec(Spec):
    """A label carried by the samples' metadata.

    `also`: further views, whose label the same head says in terms of their own. `form`: of the
    head, as in `mmssl.heads.project`.
    """

    kind: Literal["label"]
    view: str
    also: list[str] = []
    form: Literal["linear", "bn_relu_linear"] = "linear"
    field: str
    classes: list[str] = Field(min_length=2)


class RotationSpec(Spec):
    """Which of four turns a view has made: by 0, 90, 180 or 270 degrees; of a spectrogram: none,
    backwards, upside down, both.
    """

    kind: Literal["rotation"]
    view: str


class OrderSpec(Spec):
    """The order in which shuffled tiles of a view's signal belong, by perturbed ranks.

    `tiles`: how many along each axis of the signal, time first; axes left out are not cut. `cover`:
    share of its stretch that a tile covers, at a random place in it, so that tiles do not touch.
    `noise`, `samples`: size and number of draws of the noise that makes ranks differentiable.
    """

    kind: Literal["order"]
    view: str
    tiles: list[Annotated[int, Field(gt=0)]] = Field([10], min_length=1, max_length=3)
    cover: float = Field(0.8, gt=0, le=1)
    noise: float = Field(1.0, ge=0)
    samples: int = Field(100, gt=0)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return prod(self.tiles)


class GapSpec(Spec):
    """How far apart two slices of a view are, as a share of the largest distance (TemporalGap).

    `frames`: of a slice, which begins anywhere in the view.
    """

    kind: Literal["gap"]
    view: str
    frames: int = Field(96, gt=0)


class SequenceSpec(Spec):
    """What comes later and what came before, see `mmssl.tasks.pretext.Succession`.

    `frames`: tokens of a stretch. `gap`: from the drawn token to a stretch, at least.
    """

    kind: Literal["sequence"]
    view: str
    frames: int = Field(5, gt=0)
    gap: int = Field(16, gt=0)


class ClusterSpec(Spec):
    """The cluster of a clip's features of the last epoch, see `mmssl.tasks.clustered.Clustered`.

    `clips`: rows of the manifest that `data.train`, one folder, was made of. `components`:
    principal components that are whitened. `sweeps`: iterations of k-means, at most.
    """

    kind: Literal["clusters"]
    view: str
    clips: int = Field(gt=1)
    clusters: int = Field(10_000, gt=1)
    components: int = Field(256, gt=0)
    sweeps: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> ClusterSpec:
        if self.clusters > self.clips:
            raise ValueError(
                f"{self.clusters} `clusters` of {self.clips} `clips`: ask for fewer clusters"
            )
        return self


class ClassifySpec(Spec):
    """Cross-entropy on a label; `order` has a loss of ranks, `gap` labels between 0 and 1.

    `embed` are widths of an MLP: before the last layer, too, where that is no match.

    A match compares what `pool` and `embed` make of each view, or its vectors in the `space` of a
    pairs task above ("task.space"), whose heads both tasks then train. A label is read from what
    `pool` makes, or from such a vector.
    """

    kind: Literal["classify"]
    target: Annotated[
        MatchSpec | LabelSpec | RotationSpec | OrderSpec | GapSpec | SequenceSpec | ClusterSpec,
        Field(discriminator="kind"),
    ]
    score: MatchScoreSpec = FusionSpec(kind="fusion")
    space: str = ""
    pool: str = "agg"
    embed: list[int] = []  # between pooling and score (AVE-Net: 128, 128)
    weight: Number = 1.0


class MaskSpec(Spec):
    """Which tokens are hidden, and how (`hide`, see `mmssl.towers.Mask`)."""

    rule: Literal["all", "random", "blocks", "beit_blocks", "tubes", "spans", "words", "ngrams"]
    hide: Literal["cells", "latents", "features", "drop"] = "cells"
    ratio: Number = 0.5
    length: int = Field(10, gt=0)  # spans: tokens per span
    start_prob: float = Field(0.065, gt=0, le=1)  # spans: started per token
    min_spans: int = Field(1, ge=0)  # spans per row, at least
    block: tuple[int, int] = (5, 5)  # blocks: cells per side
    inverse: bool = True  # blocks: stay visible instead of being hidden
    smallest: int = Field(16, gt=0)  # beit_blocks: cells of a block, at least
    replacement: bool = False  # words: drawn with replacement, so that a few less differ (ELECTRA)
    longest: int = Field(3, gt=0)  # ngrams: whole words of the longest; 1 = whole-word masking
    shares: tuple[float, float] = (0.8, 0.1)  # ids: replaced by the mask, and by random ids


class MaskedSpec(Spec):
    """Masked prediction: hide, encode, predict what was hidden.

    `rows`: share of rows that take part. `weights`: of the target's terms by name, 1 if not given.
    """

    kind: Literal["masked"]
    view: str
    mask: MaskSpec
    target: TargetSpec
    hidden: int = Field(0, ge=0)  # width of one hidden layer in the prediction head; 0 = linear
    rows: float = Field(1.0, gt=0, le=1)
    weight: Number = 1.0
    weights: dict[str, Number] = {}


class LaterLatentSpec(Spec):
    """The stem's latent, or the tower's code of it, among others.

    `objective`: one yes/no each (`bce`), or a softmax of dot products over `temperature` (`nce`).
    `negatives_of`: drawn for each target from its own `row`, or for each frame that predicts from
    the `batch` of all ranks (CPC). `predictor`: causal layers between the tower and the linear maps
    of the steps (CPC2). Terms: the loss, named like the task; `commitment`; watched: `accuracy`,
    `diversity`, `perplexity`.
    """

    kind: Literal["latents"] = "latents"
    objective: Literal["bce", "nce"] = "bce"
    temperature: float = Field(1.0, gt=0)
    negatives: int = Field(10, gt=0)
    negatives_of: Literal["row", "batch"] = "row"
    bias: bool = True  # of the maps, shared by the steps
    predictor: TransformerSpec | None = None


class LaterFrameSpec(Spec):
    """The cells of the input themselves, by their absolute error (APC).

    `quantizer`: the maps of the steps read codes of the context (VQ-APC); the tower's output, which
    others read, is the context itself. Watched: `diversity`, `perplexity`.
    """

    kind: Literal["frames"]
    quantizer: QuantizerSpec | None = None


class FutureSpec(Spec):
    """Prediction of what follows: token t says what is `first`, first + 1 ... tokens later.

    `steps`: how many, each with a head of its own. `first`: 0 takes the first token whose cell of
    the input does not overlap with that of t. `predicts`: another view of the same cut and tower,
    whose tokens are predicted (CPC2: the clean sound from an altered one). `weights`: of the
    target's terms by name.
    """

    kind: Literal["future"]
    view: str
    predicts: str = ""  # empty: the view itself
    target: Annotated[LaterLatentSpec | LaterFrameSpec, Field(discriminator="kind")] = (
        LaterLatentSpec()
    )
    steps: int = Field(12, gt=0)
    first: int = Field(0, ge=0)
    weight: Number = 1.0
    weights: dict[str, Number] = {}


class SiameseSpec(Spec):
    """Two views of a row, compared without the other rows' views.

    `pool`: as in a space of `pairs`, one for all or one per modality. `decay`: the target is the
    moving average of the towers and projectors; null: the network itself, behind a stop-gradient.
    """

    kind: Literal["siamese"]
    between: tuple[str, str]
    pool: str | dict[Modality, str] = "agg"
    projector: MLPSpec
    predictor: MLPSpec | None = None
    decay: Number | None = None
    objective: Annotated[CosineSpec | QueueSpec | CrossCorrelationSpec, Field(discriminator="kind")]
    weight: Number = 1.0

    @model_validator(mode="after")
    def _fits(self) -> SiameseSpec:
        if self.between[0] == self.between[1]:
            raise ValueError("`between` needs two views: another cut of the clip, or modality")
        predictor, width = self.predictor, self.projector.widths[-1]
        if isinstance(self.objective, CrossCorrelationSpec):
            if predictor is not None or self.decay is not None:
                raise ValueError(
                    "`cross_correlation` trains both sides: leave `predictor` and `decay` out"
                )
        elif isinstance(self.objective, QueueSpec):
            if self.decay is None:
                raise ValueError("a `queue` needs keys that change slowly: give `decay`")
        elif predictor is None:
            raise ValueError(f"`{self.objective.kind}` collapses without a `predictor`: give one")
        if predictor is not None and predictor.widths[-1] != width:
            raise ValueError(
                f"the `predictor` ends at width {predictor.widths[-1]}, the `projector` at "
                f"{width}; make them equal"
            )
        return self

    @property
    def queries(self) -> tuple[str, ...]:
        """The views that ask for the other one."""
        one_way = isinstance(self.objective, QueueSpec) and not self.objective.symmetric
        return self.between[:1] if one_way else self.between


class PrototypesSpec(Spec):
    """Swapped prediction of balanced assignments to prototypes (SwAV).

    `assigned`: views whose assignments every other view predicts; `others` only predict (small
    crops). `pool`, `projector`: as in `siamese`; what it gives is made unit vectors. `frozen`: the
    share of the run's steps in which the prototypes stay as they are. `queue`: vectors of earlier
    steps, for each of `assigned`, that take part in the assignment once there are so many;
    collected from the share `queue_from` of the run on.
    """

    kind: Literal["prototypes"]
    assigned: list[str] = Field(min_length=1)
    others: list[str] = []
    pool: str | dict[Modality, str] = "agg"
    projector: MLPSpec
    prototypes: int = Field(3000, gt=1)
    temperature: float = Field(0.1, gt=0)
    epsilon: float = Field(0.05, gt=0)
    iterations: int = Field(3, gt=0)
    frozen: float = Field(0.0, ge=0, le=1)
    queue: int = Field(0, ge=0)
    queue_from: float = Field(0.0, ge=0, le=1)
    weight: Number = 1.0

    @property
    def views(self) -> list[str]:
        """All views, in the order they are read."""
        return [*self.assigned, *self.others]

    @model_validator(mode="after")
    def _fits(self) -> PrototypesSpec:
        if len(self.views) < 2 or len({*self.views}) < len(self.views):
            raise ValueError("`assigned` and `others` need at least two views, each of them once")
        return self


TaskSpec = Annotated[
    PairsSpec
    | ClassifySpec
    | MaskedSpec
    | FutureSpec
    | SiameseSpec
    | PrototypesSpec
    | ReconstructSpec
    | RegressSpec
    | SeparateSpec
    | AlignmentSpec,
    Field(discriminator="kind"),
]
