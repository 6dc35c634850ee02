"""Records of the separation of mixed sounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.specs.base import Number, Spec


class PermutationSpec(Spec):
    """Every output is one of the sounds; their order is the best of the mixture (PIT).

    The loss is the negative scale-invariant signal-to-distortion ratio in dB. There are as many
    outputs as sounds.
    """

    kind: Literal["permutation"] = "permutation"


class RemixSpec(Spec):
    """The outputs add up, each in one of them, to the two halves of the sounds (MixIT).

    No sound is known by itself. `limit_db`: no half can be better than that.
    """

    kind: Literal["remix"]
    outputs: int = Field(8, ge=2, le=12)  # 2^outputs remixes are compared
    limit_db: float = 30.0


class SeparateSpec(Spec):
    """Sounds of several rows are added up; masks on the latents of a tower take them apart.

    `sounds`: clips in what is heard; 1 = the clip itself. `db`: a clip's level above that of each
    clip beside it. `clean`: another view of the same cut, which the outputs are compared with
    instead of what is heard. `mask`: what makes masks of numbers. `consistency`: the outputs share
    what they lack of the mixture, see `mmssl.heads.separate.MaskHead`.
    """

    kind: Literal["separate"]
    view: str
    clean: str = ""  # empty: the view itself
    sounds: int = Field(2, ge=1, le=12)
    db: tuple[float, float] = (-5.0, 5.0)
    objective: Annotated[PermutationSpec | RemixSpec, Field(discriminator="kind")] = (
        PermutationSpec()
    )
    mask: Literal["relu", "sigmoid"] = "relu"
    consistency: Literal["none", "equal", "learned"] = "none"
    weight: Number = 1.0

    @property
    def outputs(self) -> int:
        """How many sounds a mixture is taken apart into."""
        return (
            self.sounds if isinstance(self.objective, PermutationSpec) else self.objective.outputs
        )

    @model_validator(mode="after")
    def _fits(self) -> SeparateSpec:
        if isinstance(self.objective, RemixSpec) and self.sounds % 2:
            raise ValueError("`remix` needs an even number of `sounds`: two mixtures of as many")
        if isinstance(self.objective, PermutationSpec) and self.sounds > 6:
            raise ValueError("`permutation` compares all orders of at most 6 `sounds`")
        return self
