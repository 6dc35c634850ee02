"""Records of quantizers, of towers and of targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmssl.specs.base import Number, Schedule, Spec


class GumbelSpec(Spec):
    """Product quantizer with Gumbel softmax (wav2vec 2.0).

    `hidden`: width of a layer with `activation` in front of the logits (vq-wav2vec); 0 = none.
    """

    kind: Literal["gumbel"]
    groups: int = Field(2, gt=0)
    entries: int = Field(320, gt=0)
    width: int = Field(256, gt=0)  # of a quantised vector, all groups together
    shared_codebook: bool = False
    hidden: int = Field(0, ge=0)
    activation: Literal["gelu", "relu"] = "gelu"
    temperature: Number = Schedule(kind="exponential", start=2.0, end=0.5, until=0.7)


class NearestSpec(Spec):
    """Nearest codebook entry of each group, straight through (VQ-VAE, vq-wav2vec's k-means).

    `ema`: entries are moving averages of the latents that chose them, with this decay; in tasks of
    kind `reconstruct`. 0: they are learned by their own loss. `restart`: of those, entries that are
    chosen less often than that share of the mean become latents of the step.
    """

    kind: Literal["nearest"]
    groups: int = Field(2, gt=0)
    entries: int = Field(320, gt=0)
    shared_codebook: bool = True
    commitment: float = Field(0.25, ge=0)
    project: bool = True
    ema: float = Field(0.0, ge=0, lt=1)
    restart: float = Field(0.0, ge=0, lt=1)


QuantizerSpec = Annotated[GumbelSpec | NearestSpec, Field(discriminator="kind")]
