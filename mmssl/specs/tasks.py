"""Records of the tasks, their objectives and targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Number, Spec
from mmssl.specs.heads import DotSpec, FusionSpec, HeadsSpec, MatchScoreSpec, ScoreSpec
from mmssl.specs.quantizers import QuantizerSpec
from mmssl.specs.targets import TargetSpec
from mmssl.specs.towers import TransformerSpec


class InfoNCESpec(Spec):
    """Softmax over the global batch. `max_scale` caps the learned 1/temperature."""

    kind: Literal["info_nce"] = "info_nce"
    form: Literal["symmetric", "one_way"] = "symmetric"
    temperature: float = Field(0.07, gt=0)
    learned: bool = True
    max_scale: float = Field(100.0, gt=0)
    equal_text: bool = False  # rows with equal captions are positives


class MilNCESpec(Spec):
    """MIL-NCE of MMV/VATT in its three forms (NCE when every row has one candidate)."""

    kind: Literal["mil_nce"]
    form: Literal["released", "strict", "symmetric"] = "released"
    temperature: float = Field(0.07, gt=0)
    learned: bool = False
    max_scale: float = Field(100.0, gt=0)
    equal_text: bool = False


class SigmoidSpec(Spec):
    """Independent yes/no for every pair (SigLIP)."""

    kind: Literal["sigmoid"]
    scale: float = Field(10.0, gt=0)
    bias: float = -10.0
    equal_text: bool = False


class TripletSpec(Spec):
    """The own partner scores higher than a random one by a margin, both ways (DAVEnet)."""

    kind: Literal["triplet"]
    margin: float = Field(1.0, ge=0)
    equal_text: Literal[False] = False


PairObjective = Annotated[
    InfoNCESpec | MilNCESpec | SigmoidSpec | TripletSpec, Field(discriminator="kind")
]


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
    """A label carried by the samples' metadata."""

    kind: Literal["label"]
    view: str
    field: str
    classes: list[str] = Field(min_length=2)


class ClassifySpec(Spec):
    """Cross-entropy on a label.

    A match compares what `pool` and `embed` make of each view, or its vectors in the `space` of a
    pairs task above ("task.space"), whose heads both tasks then train.
    """

    kind: Literal["classify"]
    target: Annotated[MatchSpec | LabelSpec, Field(discriminator="kind")]
    score: MatchScoreSpec = FusionSpec(kind="fusion")
    space: str = ""
    pool: str = "agg"
    embed: list[int] = []  # widths of an MLP between pooling and score (AVE-Net: 128, 128)
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


TaskSpec = Annotated[
    PairsSpec | ClassifySpec | MaskedSpec | FutureSpec, Field(discriminator="kind")
]
