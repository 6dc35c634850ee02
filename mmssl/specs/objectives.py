"""What `pairs` and `siamese` minimise, and the queue of `siamese`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Spec


class InfoNCESpec(Spec):
    """Softmax over the global batch. `max_scale` caps the learned 1/temperature.

    `two_n`: symmetric, and the other rows of a query's own side are negatives, too (NT-Xent).
    """

    kind: Literal["info_nce"] = "info_nce"
    form: Literal["symmetric", "one_way", "two_n"] = "symmetric"
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


class SemiHardSpec(Spec):
    """Triplets of first view, second view and the nearest farther row of the batch's second views.

    `margin`: in squared distances of unit vectors. `negative: mixed`: not mined, but the sound that
    the augmentation `mel_mix` of the second view has laid over it (Jansen et al. 2018). Watched:
    `active`, the share of triplets with a loss; `semi_hard`, of those with a farther row.
    """

    kind: Literal["semi_hard"]
    margin: float = Field(0.1, ge=0)
    negative: Literal["mined", "mixed"] = "mined"
    equal_text: Literal[False] = False


class CriticSpec(Spec):
    """Mutual information by a critic of own and random pairs; see `mmssl.objectives.critic`.

    `per_step`: in a space that is pooled in `steps`, each of them is compared by itself.
    """

    kind: Literal["critic"]
    bound: Literal["bce", "mine", "nce"] = "bce"
    per_step: bool = False
    equal_text: Literal[False] = False


PairObjective = Annotated[
    InfoNCESpec | MilNCESpec | SigmoidSpec | TripletSpec | SemiHardSpec | CriticSpec,
    Field(discriminator="kind"),
]


class CosineSpec(Spec):
    """Regression of the other view's vector: `cosine`, -cos, the mean of both directions (SimSiam);
    `byol`, 2 - 2 cos, their sum.
    """

    kind: Literal["cosine", "byol"]


class QueueSpec(Spec):
    """InfoNCE against keys of earlier steps (MoCo).

    The first view asks for the second; `symmetric` also the other way round, with a queue of its
    own.
    """

    kind: Literal["queue"]
    size: int = Field(65536, gt=0)
    temperature: float = Field(0.07, gt=0)
    symmetric: bool = False


class CrossCorrelationSpec(Spec):
    """Channels of the two views correlate with themselves and with no other (Barlow Twins)."""

    kind: Literal["cross_correlation"]
    off_diagonal: float = Field(0.0051, ge=0)
