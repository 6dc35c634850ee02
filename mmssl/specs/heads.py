"""Records of common spaces, the projection heads into them, and scores of two embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Modality, Spec


class SpaceSpec(Spec):
    """A common space and what it is made from.

    pool: a global token's name, `mean` or `max` over all tokens, `peaks`: the mean over time of the
    strongest cell of each step, or `steps`: the same without the mean, every step projected by
    itself and concatenated, so that a dot product adds up what happens at the same time. One for
    all, or one per modality.
    """

    dim: int = Field(512, gt=0)
    pool: str | dict[Modality, str] = "agg"
    steps: int = Field(8, gt=0)
    members: list[Modality] = []  # modalities of the space; empty = those of the pairs that use it


class HeadsSpec(Spec):
    """Projection heads into the common spaces; graphs and forms as in `mmssl.heads.project`."""

    graph: Literal["linear", "shared", "disjoint", "fac"] = "linear"
    form: str = ""  # empty: LayerNorm + linear (`linear`), MLP with batch norm (`shared`)
    spaces: dict[str, SpaceSpec] = {"common": SpaceSpec()}
    hidden: int = Field(0, ge=0)  # width of the hidden layer; 0 = the space's
    bias: bool = True  # of the first video layer (MMV has it, VATT has not)
    audio_norm: bool = False  # fac: lets audio->vat be trained, with a batch norm of its own


class MLPSpec(Spec):
    """Linear maps with ReLU between them; the fields are explained at `mmssl.heads.mlp.MLP`.

    `constant_lr`: they learn at the peak rate all the time (SimSiam's predictor).
    """

    widths: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    norm: Literal["none", "hidden", "all"] = "hidden"
    bias: bool = True
    constant_lr: bool = False


class DotSpec(Spec):
    """Dot product, of unit vectors unless `normalize` is off."""

    kind: Literal["dot"] = "dot"
    normalize: bool = True


class BilinearSpec(Spec):
    """g^T W g' (COLA)."""

    kind: Literal["bilinear"]
    std: float = Field(0.05, gt=0)


class DistanceSpec(Spec):
    """Affine function of the Euclidean distance of unit vectors (AVE-Net).

    To begin with, the log-odds of a match are 2 * slope * (threshold - distance).
    """

    kind: Literal["distance"]
    slope: float = Field(1.0, gt=0)
    threshold: float = Field(2**0.5, gt=0, le=2)


class FusionSpec(Spec):
    """MLP on the concatenated vectors (L3-Net)."""

    kind: Literal["fusion"]
    hidden: int = Field(128, gt=0)


class JointScoreSpec(Spec):
    """Linear read-out of a joint tower's first global token."""

    kind: Literal["joint"]
    joint: str


class MapSpec(Spec):
    """Similarity of every video cell with audio or text, reduced over cells, then over steps.

    `query`: the other side's `steps`, or one vector pooled from it (a global token's name, `mean`,
    `max`, `peaks`). `aligned`: a step is compared only with the cells of the same instant; a pooled
    query with the cells of every instant in turn. `cells`: those that leave the backbone, or those
    of the `stem`, which know their own place only. `space: soft`: the mean of the cells above the
    similarity `above`; those below `below` are one more negative (LVS, info_nce only). `sharpness`:
    of `lse` and `soft`. `heads`: parts of `dim` of which the best counts (DenseAV). `form`: of the
    projections, see `mmssl.heads.dense`. `normalize`: which side has unit length. `weigh: motion`:
    a cell of the stem counts by how much moves inside it, so that it answers for what it holds and
    not for what it sees beyond its border.
    """

    kind: Literal["map"]
    dim: int = Field(128, gt=0)
    space: Literal["max", "mean", "lse", "soft"] = "max"
    time: Literal["mean", "max"] = "mean"
    aligned: bool = False
    cells: Literal["backbone", "stem"] = "backbone"
    query: str = "steps"
    sharpness: float = Field(10.0, gt=0)
    above: float = 0.65
    below: float = 0.4
    heads: int = Field(1, gt=0)
    form: str | dict[Modality, str] = ""
    normalize: Literal["both", "steps", "none"] = "both"
    weigh: Literal["", "motion"] = ""

    @model_validator(mode="after")
    def _fits(self) -> MapSpec:
        if self.weigh and (self.cells != "stem" or self.normalize == "both"):
            raise ValueError(
                "`weigh` scales cells of the stem: it needs `cells: stem` and a `normalize` other "
                "than `both`"
            )
        if self.dim % self.heads:
            raise ValueError(f"`dim` ({self.dim}) must be a multiple of `heads` ({self.heads})")
        return self


class MatchMapSpec(MapSpec):
    """Logit scale * score + bias of a map score (AVOL-Net); the learned scale stays positive."""

    scale: float = Field(1.0, gt=0, le=100)
    bias: float = 0.0


ScoreSpec = Annotated[DotSpec | BilinearSpec | DistanceSpec | MapSpec, Field(discriminator="kind")]
MatchScoreSpec = Annotated[
    DistanceSpec | FusionSpec | JointScoreSpec | MatchMapSpec, Field(discriminator="kind")
]
